"""Chooses the text for activation ranges: calibration data, or a few built-in sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from prune_export.calibrate import TokenSet
from prune_export.checkpoint.loading import load_tokenizer
from prune_export.errors import CheckpointError

WINDOWS: Final = 16
LENGTH: Final = 512
_TEXT: Final = (
    "The harbour froze twice that winter, and both times the ferry waited three days for the ice.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n",
    "In 1848 the town had 1,204 houses, 17 mills and a railway station that nobody had asked for.",
    "Q: What is 17 times 6? A: 17 times 6 is 102, because 10 times 6 is 60 and 7 times 6 is 42.",
    "Dear Ms Okafor, thank you for your letter of 3 May; the spare parts will be sent on Monday.",
    "La bibliothèque ferme à dix-neuf heures. Der Zug nach Köln fährt heute von Gleis acht ab.",
    "She opened the window, listened for a while, and said that it would rain before the evening.",
    "The court held that the contract was void: neither party had signed the second page.",
    '{"name": "sensor-7", "unit": "°C", "values": [21.4, 21.9, 22.3], "valid": true}',
)


def calibration(
    checkpoint: Path, tokens: TokenSet | None, vocabulary: int
) -> tuple[np.ndarray, str]:
    """The windows int64 `[windows, length]` to quantize with, and a note on what they are."""
    if tokens is not None:
        ids = tokens.ids[:WINDOWS, :LENGTH].numpy()
        return ids, f"{len(ids)} windows of {ids.shape[1]} tokens of the recipe's calibration data"
    encoded = _encoded(checkpoint)
    if encoded is None:
        ids = np.random.default_rng(0).integers(0, vocabulary, (4, 64))
        return ids, "4 windows of 64 random tokens: the checkpoint has no tokenizer"
    return (
        encoded,
        f"{encoded.size} tokens of built-in sentences: the recipe has no calibration data",
    )


def _encoded(checkpoint: Path) -> np.ndarray | None:
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError:
        return None
    ids = [token for text in _TEXT for token in tokenizer(text)["input_ids"]]
    return np.array([ids[:LENGTH]], np.int64)
