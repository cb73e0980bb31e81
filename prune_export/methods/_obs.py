"""Optimal brain surgery on a matrix `[out, in]`, one input after another, all outputs at once.

With `G` the damped Gram matrix of the inputs and `U` the upper triangular matrix for which
`U^T U` is its inverse, removing weight `w_j` of an output costs `w_j^2 / U_jj^2`, and the error
`e_j = w_j / U_jj` is taken from the later weights as `e_j U_jk`. All arithmetic works on the
transposed matrix, where an input is a contiguous row, and goes down a halving of the inputs: what
the left half's errors do to the right half is one matrix product, at every level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from prune_export.errors import StageError
from prune_export.methods._mask import Amount, count_of, smallest
from prune_export.nm import Nm

_LEAF: Final = 16
"""Inputs that are gone through one by one; more than so many are halved."""

_MOST_DAMPING: Final = 1.0


@dataclass(frozen=True)
class Factor:
    """`upper` `[in, in]`, whose `upper^T upper` inverts the damped Gram matrix.

    `dead` `[in]` are inputs that were always zero; `damping` is what was needed.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    damping: float


@dataclass(frozen=True)
class Pruned:
    """New weights, the scores by which zeros were chosen, and the mask (True where zero)."""

    weight: torch.Tensor
    scores: torch.Tensor
    mask: torch.Tensor


def factor(gram: torch.Tensor, damping: float, where: str) -> Factor:
    """The factor of the inverse of `gram` `[in, in]`, which is overwritten.

    `damping` times the mean of the diagonal is added to it, ten times as much as often as needed.

    Raises:
        StageError: with damping 1 there still is no factor.
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.double().mean())
    if mean <= 0:
        # Nothing was seen: every weight counts by its size alone.
        return Factor(torch.eye(len(gram), device=gram.device), torch.zeros_like(dead), damping)
    # With all indices reversed, G = L L^T, and U is the inverse of L, reversed again: one
    # factorization and a triangular inverse, where the textbook inverts G and factors that.
    diagonal.masked_fill_(dead, mean)
    added = 0.0
    while True:
        diagonal += (damping - added) * mean
        added = damping
        lower, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            break
        if damping >= _MOST_DAMPING:
            raise StageError(
                where,
                f"the Gram matrix of its inputs has no Cholesky factor with damping {damping:g}",
                "look for calibration states that are not finite, or exclude its role",
            )
        damping = min(10 * damping, _MOST_DAMPING)
    _invert(lower)
    return Factor(lower.flip(0, 1), dead, damping)


def _invert(lower: torch.Tensor) -> None:
    """Inverts a lower triangular matrix in place, by halves: products only, no second matrix."""
    width = len(lower)
    if width <= 64:
        identity = torch.eye(width, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = width // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(last)
    below.copy_((last @ below).mul_(-1) @ first)


def prune(weight: torch.Tensor, factor: Factor, amount: Amount, columns: int) -> Pruned:
    """A matrix `[out, in]` with zeros, and its other weights changed to make up for them.

    A fraction is removed of every `columns` neighbouring inputs, over all outputs.
    """
    work = _Work(weight.T.contiguous(), factor, amount, columns)
    work.descend(0, len(work.weight))
    return Pruned(work.weight.T.contiguous(), work.scores.T, work.mask.T)


class _Work:
    """One matrix on its way, transposed: all of its tensors are `[in, out]`."""

    def __init__(self, weight: torch.Tensor, factor: Factor, amount: Amount, columns: int) -> None:
        self.weight, self.factor, self.amount = weight, factor, amount
        self.step = amount.of if isinstance(amount, Nm) else columns
        self.gone = weight == 0
        self.mask = torch.zeros_like(weight, dtype=torch.bool)
        self.scores = torch.empty_like(weight)
        self.errors = torch.zeros_like(weight)
        self.worth = factor.upper.diagonal().square().reciprocal()
        self.worth.masked_fill_(factor.dead, 0)
        self.inverse = factor.upper.diagonal().reciprocal()

    def descend(self, start: int, stop: int) -> None:
        """Goes through inputs from `start` to `stop`, all earlier errors being taken off them."""
        if stop - start <= self.step:
            self.choose(start, stop)
            self.within(start, stop)
        else:
            self.halves(start, stop, self.step, self.descend)

    def within(self, start: int, stop: int) -> None:
        """Goes through inputs whose zeros are chosen."""
        if stop - start <= _LEAF:
            self.leaf(start, stop)
        else:
            self.halves(start, stop, 1, self.within)

    def halves(self, start: int, stop: int, unit: int, go: Callable[[int, int], None]) -> None:
        """Goes through the first half, takes its errors off the second, and goes through that."""
        middle = start + unit * -(-(stop - start) // (2 * unit))
        go(start, middle)
        upper = self.factor.upper[start:middle, middle:stop]
        self.weight[middle:stop].addmm_(upper.T, self.errors[start:middle], alpha=-1)
        go(middle, stop)

    def choose(self, start: int, stop: int) -> None:
        """Which weights of these inputs become zero."""
        here = slice(start, stop)
        scores = self.weight[here].square().mul_(self.worth[here, None])
        scores[self.gone[here]] = -1
        self.scores[here] = scores
        if isinstance(self.amount, Nm):
            chosen = smallest(scores.T.contiguous(), self.amount.of - self.amount.keep).T
        else:
            outputs = scores.shape[1]
            count = count_of(self.amount, stop * outputs) - count_of(self.amount, start * outputs)
            chosen = smallest(scores.reshape(1, -1), count).view_as(scores)
        self.mask[here] = chosen | self.gone[here]

    def leaf(self, start: int, stop: int) -> None:
        """Goes through inputs whose zeros are chosen, one by one."""
        here = slice(start, stop)
        upper, weight, errors = self.factor.upper[here, here], self.weight[here], self.errors[here]
        scale = self.mask[here] * self.inverse[here, None]
        for j in range(stop - start):
            torch.mul(weight[j], scale[j], out=errors[j])
            if j + 1 < stop - start:
                weight[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        weight.masked_fill_(self.mask[here], 0)
