"""Comparisons of logits, against torch's."""

from __future__ import annotations

import math

import numpy as np
import torch

from prune_export.numeric.logits import largest_error, log_softmax, mean_kl


def test_they_are_those_of_torch() -> None:
    random = np.random.default_rng(0)
    wanted, got = random.normal(size=(2, 3, 7)), random.normal(size=(2, 3, 7)).astype(np.float32)
    p, q = (torch.from_numpy(one).double().log_softmax(-1) for one in (wanted, got))
    np.testing.assert_allclose(log_softmax(got), q.numpy(), rtol=1e-12)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
    assert math.isclose(mean_kl(wanted, got), float(kl), rel_tol=1e-9)
    assert largest_error(wanted, got) == float(np.abs(wanted - got).max())


def test_what_is_not_a_number_is_no_small_error() -> None:
    assert math.isnan(largest_error(np.zeros(3), np.array([0, np.nan, 0])))
