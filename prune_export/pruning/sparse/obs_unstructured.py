"""SparseGPT's optimal brain surgeon on a matrix `[out, in]`: column by column, all rows at once.

With `H` the damped Hessian `XᵀX` of the inputs and `U` the upper triangular matrix for which
`U^T U` is its inverse, removing weight `w_j` of an output costs `w_j^2 / U_jj^2`, and the error
`e_j = w_j / U_jj` is taken from the later weights as `e_j U_jk`. All arithmetic works on the
transposed matrix, where an input is a contiguous row, and goes down a halving of the inputs: what
the left half's errors do to the right half is one matrix product, at every level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

from prune_export.numeric.cholesky import damped_cholesky
from prune_export.pruning.sparse.masks import Amount, count_of, keep_only, smallest, smallest_lanes
from prune_export.sparsity.nm import Nm

_LEAF: Final = 16
"""Inputs that are gone through one by one; more than so many are halved."""

_TOGETHER: Final = 2**22
"""Weights of the small matrices that are worked on at once."""


@dataclass(frozen=True)
class Factor:
    """The Cholesky factor of the inverse Hessian: `upper^T upper` `[in, in]` is the inverse.

    `dead` `[in]` are inputs that were always zero; `damping` is what was needed.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    damping: float


@dataclass(frozen=True)
class Pruned:
    """A pruned matrix: new weights, the scores of the old ones, and what is kept."""

    weight: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor


def factor(hessian: torch.Tensor, damping: float, where: str) -> Factor:
    """Factors the inverse of a Hessian `[in, in]`, which is overwritten.

    `damping` times the mean of the diagonal is added to it, ten times as much as often as needed.

    Raises:
        StageError: with damping 1 there still is no factor.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = float(diagonal.double().mean())
    if mean <= 0:
        # Nothing was seen: every weight counts by its size alone.
        return Factor(
            torch.eye(len(hessian), device=hessian.device), torch.zeros_like(dead), damping
        )
    # With all indices reversed, G = L L^T, and U is the inverse of L, reversed again: one
    # factorization and a triangular inverse, where the textbook inverts G and factors that.
    diagonal.masked_fill_(dead, mean)
    lower, damping = damped_cholesky(hessian, damping, mean, where, reverse=True)
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


def prune(
    weights: Sequence[torch.Tensor], factor: Factor, amount: Amount, columns: int
) -> Iterator[Pruned]:
    """Prunes matrices `[out, in]` that share inputs, and updates their remaining weights.

    A fraction is removed of every `columns` neighbouring inputs, over all outputs of a matrix.
    """
    for together in _batches(weights):
        work = _Work(together, factor, amount, columns)
        work.descend(0, len(work.weight))
        for start, stop in work.spans:
            weight, removed = (
                part[:, start:stop].T.contiguous() for part in (work.weight, work.removed)
            )
            yield Pruned(weight, work.scores[:, start:stop].T, removed.logical_not_())


def _batches(weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Groups matrices that are pruned together: small ones, as each step has a fixed cost."""
    held: list[torch.Tensor] = []
    for weight in weights:
        if held and sum(one.numel() for one in held) + weight.numel() > _TOGETHER:
            yield held
            held = []
        held.append(weight)
    yield held


class _Work:
    """The matrices being pruned, transposed and side by side: all tensors are `[in, outputs]`."""

    def __init__(
        self, weights: Sequence[torch.Tensor], factor: Factor, amount: Amount, columns: int
    ) -> None:
        self.factor, self.amount = factor, amount
        self.weight = torch.cat([weight.T for weight in weights], 1).contiguous()
        ends = list(accumulate(len(weight) for weight in weights))
        self.spans = list(zip([0, *ends], ends, strict=False))
        self.step = amount.of if isinstance(amount, Nm) else columns
        self.gone = self.weight == 0
        self.removed = torch.empty_like(self.gone)
        self.scores = torch.empty_like(self.weight)
        self.errors = torch.empty_like(self.weight)
        self.worth = factor.upper.diagonal().square().reciprocal()
        self.worth.masked_fill_(factor.dead, 0)
        self.inverse = factor.upper.diagonal().reciprocal()

    def descend(self, start: int, stop: int) -> None:
        """Prunes inputs `start` to `stop`; errors of all earlier ones are subtracted already."""
        if stop - start <= self.step:
            self.choose(start, stop)
            self.within(start, stop)
        else:
            self.halves(start, stop, self.step, self.descend)

    def within(self, start: int, stop: int) -> None:
        """Prunes inputs of which it is chosen what becomes zero."""
        if stop - start <= _LEAF:
            self.leaf(start, stop)
        else:
            self.halves(start, stop, 1, self.within)

    def halves(self, start: int, stop: int, unit: int, go: Callable[[int, int], None]) -> None:
        """Prunes the first half, subtracts its errors from the second, and prunes that."""
        middle = start + unit * -(-(stop - start) // (2 * unit))
        go(start, middle)
        upper = self.factor.upper[start:middle, middle:stop]
        self.weight[middle:stop].addmm_(upper.T, self.errors[start:middle], alpha=-1)
        go(middle, stop)

    def choose(self, start: int, stop: int) -> None:
        """Chooses the weights of these inputs that become zero."""
        scores, gone = self.scores[start:stop], self.gone[start:stop]
        torch.square(self.weight[start:stop], out=scores).mul_(self.worth[start:stop, None])
        # Zeros that were there go first; where there are more than are asked for, they stay.
        scores.masked_fill_(gone, -1)
        removed = self.removed[start:stop]
        if isinstance(self.amount, Nm):
            removed.copy_(smallest_lanes(scores, self.amount.of - self.amount.keep))
        else:
            for first, last in self.spans:
                own = scores[:, first:last].reshape(1, -1)
                count = count_of(self.amount, stop * (last - first))
                count -= count_of(self.amount, start * (last - first))
                removed[:, first:last] = smallest(own, count).view(stop - start, -1)
        removed |= gone

    def leaf(self, start: int, stop: int) -> None:
        """Prunes inputs of which it is chosen what becomes zero, one by one."""
        here = slice(start, stop)
        upper, weight = self.factor.upper[here, here], self.weight[here]
        removed = self.removed[here]
        scales = (removed * self.inverse[here, None]).unbind(0)
        rows, errors = weight.unbind(0), self.errors[here].unbind(0)
        for j in range(stop - start):
            torch.mul(rows[j], scales[j], out=errors[j])
            if j + 1 < stop - start:
                weight[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
        keep_only(weight, ~removed)
