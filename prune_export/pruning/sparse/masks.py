"""Makes masks from scores, with exact counts whatever ties there are; and fingerprints of masks.

A mask is True where a weight is kept, as in torch.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
import torch

from prune_export.errors import StageError
from prune_export.sparsity.nm import Nm

Amount = float | Nm
"""A fraction of the weights, or a pattern."""

Compare = Literal["row", "matrix"]
"""Among what the weights with the least scores are found where a fraction is removed."""

_SAMPLE: Final = 128
"""Rows and columns of the scores whose quantiles are logged: every n-th, for about so many."""

_CACHED: Final = 8192
"""Groups at a time: those of 8 float32 scores are 256 KiB."""

_QUANTILES: Final = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def count_of(fraction: float, of: int) -> int:
    """The count that a fraction of `of` is, rounded down as in the reference codes."""
    # Rounded first, as 0.35 * 20 is 6.999999999999999.
    return int(round(fraction * of, 6))


def mask_of(scores: torch.Tensor, amount: Amount, compare: Compare = "row") -> torch.Tensor:
    """Makes the mask `[out, in]` that removes an exact number of weights, those of least scores.

    A pattern is met in every group of neighbouring inputs; a fraction in every row (an output), or
    in the matrix as a whole.
    """
    return _least(scores, amount, compare).logical_not_()


def _least(scores: torch.Tensor, amount: Amount, compare: Compare) -> torch.Tensor:
    if isinstance(amount, Nm):
        lanes = scores.reshape(-1, amount.of).T.contiguous()
        found = smallest_lanes(lanes, amount.of - amount.keep)
        return found.T.contiguous().view_as(scores)
    if compare == "matrix":
        flat = scores.reshape(1, -1)
        return smallest(flat, count_of(amount, flat.shape[1])).view_as(scores)
    return smallest(scores, count_of(amount, scores.shape[1]))


def smallest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the `count` least scores of each row, bool `[rows, width]`; of equal ones, the first.

    Raises:
        StageError: scores are not numbers, so that there are no least ones.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        # numpy's vectorised selection: 2 ns a score; torch.kthvalue takes 14.
        least = np.partition(scores.numpy(), count - 1)[:, count - 1 : count]
        limit = torch.from_numpy(np.ascontiguousarray(least))
    else:
        limit = scores.kthvalue(count, keepdim=True).values
    found = scores <= limit
    if _true(found) != scores.shape[0] * count:
        _settle(found, scores, limit, count)
    return found


def smallest_lanes(lanes: torch.Tensor, count: int) -> torch.Tensor:
    """Marks the `count` least scores of each column, bool `[of, groups]`; of equal ones, the first.

    For few rows and many columns: the least are carried to the end, row against row, in parts that
    stay in the cache. 2 ns a score; selecting column by column takes 9.

    Raises:
        StageError: scores are not numbers, so that there are no least ones.
    """
    of, groups = lanes.shape
    limit = lanes.new_empty(1, groups)
    # The count-th least is the (of - count + 1)-th largest: whichever takes fewer rounds.
    rounds, upward = min((count, True), (of - count + 1, False))
    for start in range(0, groups, _CACHED):
        part = lanes[:, start : start + _CACHED].clone()
        rows = part.unbind(0)
        for done in range(rounds):
            for one, two in pairwise(rows[: of - done]):
                least, most = torch.minimum(one, two), torch.maximum(one, two)
                one.copy_(most if upward else least)
                two.copy_(least if upward else most)
        limit[0, start : start + _CACHED] = rows[of - rounds]
    found = lanes <= limit
    if _true(found) != groups * count:
        turned = found.T.contiguous()
        _settle(turned, lanes.T, limit.T, count)
        found = turned.T.contiguous()
    return found


def _settle(found: torch.Tensor, scores: torch.Tensor, limit: torch.Tensor, count: int) -> None:
    """Unmarks, in each row, the last of the scores equal to `limit`, down to `count` marks."""
    excess = found.sum(-1) - count
    if bool((excess < 0).any()):
        raise StageError(
            "scores",
            "some are not numbers, expected finite ones",
            "look for weights or calibration states that are not finite",
        )
    rows = excess.nonzero().flatten()
    for row in torch.split(rows, 65536):  # type: ignore[no-untyped-call]
        equal = scores[row] == limit[row]
        room = equal.sum(-1) - excess[row]
        found[row] &= ~equal | (equal.cumsum(-1) <= room[:, None])


def _true(found: torch.Tensor) -> int:
    return int(np.count_nonzero(found.numpy()) if found.device.type == "cpu" else found.sum())


def keep_only(weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Zeroes `weight` in place where the mask `kept` is False."""
    # By product, then -0 to 0: 1.4 ns a weight; masked_fill_ takes 4.
    return weight.mul_(kept.to(weight.dtype)).add_(0.0)


def summary(weight: torch.Tensor, scores: torch.Tensor, *, kept: torch.Tensor) -> dict[str, Any]:
    """Describes a pruned matrix `[out, in]`, its scores and its mask `kept` as JSON."""
    rows, columns = (max(1, size // _SAMPLE) for size in scores.shape)
    sample = np.sort(scores[::rows, ::columns].flatten().float().cpu().numpy())
    levels = sample[[round(level * (len(sample) - 1)) for level in _QUANTILES]]
    nonzero = _true(weight != 0)  # torch.count_nonzero takes five times as long
    return {
        "sparsity": 1 - nonzero / weight.numel(),
        "zeros": weight.numel() - nonzero,
        "weights": weight.numel(),
        "score_quantiles": [float(f"{level:.6g}") for level in levels.tolist()],
        "digest": digest(kept),
    }


def digest(kept: torch.Tensor) -> str:
    """The sha256 of the bits of a mask `[out, in]`, row by row, 1 where a weight is kept."""
    return hashlib.sha256(np.packbits(kept.cpu().numpy()).tobytes()).hexdigest()
