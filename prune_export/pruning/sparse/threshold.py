"""Finds a threshold over all scores of a model, with one matrix in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

_PART: Final = 2**20
_HALF: Final = 2**16


@dataclass(frozen=True)
class Limit:
    """A threshold: the least scores are those below `value` and the first `equal` equal to it."""

    value: float
    equal: int

    def least(self, scores: torch.Tensor) -> tuple[torch.Tensor, Limit]:
        """Marks the least of `scores` (bool of their shape); gives the limit for later ones too."""
        same = scores == self.value
        taken = min(self.equal, int(torch.count_nonzero(same)))
        first = (same.flatten().cumsum(0) <= taken).view_as(same)
        return (scores < self.value) | (same & first), Limit(self.value, self.equal - taken)


def limit_of(scores: Callable[[], Iterable[torch.Tensor]], count: int) -> Limit:
    """Finds the threshold of the `count` least scores, float32 and not negative, read twice.

    Such numbers are in the order of their bits: the upper half is counted first, and then the lower
    half of those whose upper half is that of the limit.
    """
    upper = np.zeros(_HALF, np.int64)
    for bits in _bits(scores()):
        upper += np.bincount(bits >> 16, minlength=_HALF)
    high, before = _reached(upper, count)
    lower = np.zeros(_HALF, np.int64)
    for bits in _bits(scores()):
        lower += np.bincount(bits[bits >> 16 == high] & (_HALF - 1), minlength=_HALF)
    low, smaller = _reached(lower, count - before)
    value = np.array([high << 16 | low], np.uint32).view(np.float32)
    return Limit(float(value[0]), count - before - smaller)


def _reached(counts: np.ndarray, count: int) -> tuple[int, int]:
    """Finds where the running sum of `counts` reaches `count`, and the sum before that."""
    sums = counts.cumsum()
    at = int(np.searchsorted(sums, count))
    return at, int(sums[at] - counts[at])


def _bits(scores: Iterable[torch.Tensor]) -> Iterator[np.ndarray]:
    for matrix in scores:
        flat = matrix.reshape(-1).numpy().view(np.uint32)
        for start in range(0, len(flat), _PART):
            yield flat[start : start + _PART]
