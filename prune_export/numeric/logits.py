"""Compares logits with those of PyTorch: the largest error, and how far distributions are apart."""

from __future__ import annotations

import numpy as np


def largest_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """The largest absolute difference; NaN where either is not a number."""
    return float(np.abs(wanted - got).max())


def mean_kl(wanted: np.ndarray, got: np.ndarray) -> float:
    """The mean over positions of KL(wanted ‖ got) in nats, of logits `[…, vocab]`, in float64."""
    p, q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits `[…, vocab]`, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    normal: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normal
