"""GPTQ on a matrix `[out, in]`: input by input, each weight is rounded, and later ones make up.

With `U` as in `obs_unstructured`, rounding weight `w_j` of an output to `q_j` leaves the error
`e_j = (w_j - q_j) / U_jj`, and `e_j U_jk` is taken from each later weight `w_k`. With zeros asked
for, they are chosen just before, by `w_j^2 / U_jj^2` in their block of inputs or their pattern, and
`q_j` is then 0: SparseGPT and GPTQ in one sweep. All arithmetic is on the transposed matrix, in the
order in which inputs are gone through: whole groups, so that a group's scales are chosen when its
weights have their last values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

from prune_export.grids import Grid, spanning
from prune_export.pruning.sparse.masks import Amount, count_of, smallest, smallest_lanes
from prune_export.pruning.sparse.obs_unstructured import Factor
from prune_export.sparsity.nm import Nm

_LEAF: Final = 16
"""Inputs that are gone through one by one; more than so many are halved."""

_TOGETHER: Final = 2**22
"""Weights of the small matrices that are worked on at once."""

_PARTS: Final = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
"""The parts of a group's range that are tried for its grid."""


@dataclass(frozen=True)
class Asked:
    """How to quantize: codes, groups, and zeros besides (None: only those that are there)."""

    bits: int
    group_size: int
    symmetric: bool
    search: bool
    amount: Amount | None = None
    columns: int = 128


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix `[out, in]`, its grid, and the mean of `e_j^2` over its weights.

    `scores` and `mask` (True where zero) are of the weights as they were, where zeros were asked
    for.
    """

    weight: torch.Tensor
    grid: Grid
    loss: float
    scores: torch.Tensor
    mask: torch.Tensor


def processing_order(diagonal: torch.Tensor, group_size: int, unit: int) -> torch.Tensor:
    """The order of inputs: groups by the sum of their `diagonal`, units within a group likewise.

    What is heavy comes first, while there are later weights to make up for it; a group stays
    together, so that runtimes need no order of inputs. `unit` neighbours stay in their order.
    """
    width = len(diagonal)
    units = diagonal.double().view(-1, unit).sum(1)
    group = torch.arange(len(units), device=units.device) * unit // group_size
    totals = units.new_zeros(-(-width // group_size)).index_add_(0, group, units)
    order = units.argsort(descending=True, stable=True)
    order = order[totals[group[order]].argsort(descending=True, stable=True)]
    # Equal totals would interleave groups.
    ranks = torch.empty_like(totals, dtype=torch.long)
    ranks[totals.argsort(descending=True, stable=True)] = torch.arange(
        len(totals), device=units.device
    )
    order = order[ranks[group[order]].argsort(stable=True)]
    return (order[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


def quantize(
    weights: Sequence[torch.Tensor], factor: Factor, order: torch.Tensor, asked: Asked
) -> Iterator[Quantized]:
    """Quantizes matrices `[out, in]` that share inputs; `factor` is of the inputs in `order`."""
    for together in _batches(weights):
        work = _Work(together, factor, order, asked)
        work.masks(0, len(work.groups))
        yield from work.results()


def _batches(weights: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    held: list[torch.Tensor] = []
    for weight in weights:
        if held and sum(one.numel() for one in held) + weight.numel() > _TOGETHER:
            yield held
            held = []
        held.append(weight)
    yield held


class _Work:
    """The matrices being quantized, transposed and side by side: tensors are `[in, outputs]`."""

    def __init__(
        self, weights: Sequence[torch.Tensor], factor: Factor, order: torch.Tensor, asked: Asked
    ) -> None:
        self.factor, self.order, self.asked = factor, order, asked
        self.weight = torch.cat([weight.T for weight in weights], 1)[order].contiguous()
        ends = list(accumulate(len(weight) for weight in weights))
        self.spans = list(zip([0, *ends], ends, strict=False))
        width, outputs = self.weight.shape
        # Where each group starts, in the order of the work, and which group it is.
        number = order // asked.group_size
        starts = [0, *(1 + (number[1:] != number[:-1]).nonzero().flatten()).tolist()]
        self.groups = [int(number[start]) for start in starts]
        self.edges = [*starts, width]
        self.mask = self.weight == 0
        self.scores = torch.empty_like(self.weight) if asked.amount is not None else self.weight
        self.errors = torch.empty_like(self.weight)
        self.worth = factor.upper.diagonal().square().reciprocal()
        self.worth.masked_fill_(factor.dead, 0)
        self.inverse = factor.upper.diagonal().reciprocal().tolist()
        count = len(self.groups)
        self.scales = self.weight.new_ones(count, outputs)
        self.zeros = torch.zeros(count, outputs, dtype=torch.uint8, device=self.weight.device)

    def results(self) -> Iterator[Quantized]:
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(self.order), device=back.device)
        for start, stop in self.spans:
            of = slice(start, stop)
            zeros = None if self.asked.symmetric else self.zeros[:, of].T.contiguous()
            scales = self.scales[:, of].T.contiguous()
            grid = Grid(self.asked.bits, self.asked.group_size, scales, zeros)
            loss = float(self.errors[:, of].square().mean(dtype=torch.float64))
            weight, scores, mask = (
                part[:, of].T[:, back].contiguous()
                for part in (self.weight, self.scores, self.mask)
            )
            yield Quantized(weight, grid, loss, scores, mask)

    def masks(self, first: int, last: int) -> None:
        """Does groups `first` to `last`; errors of all earlier ones are subtracted already."""
        start, stop = self.edges[first], self.edges[last]
        if last - first == 1 or stop - start <= self.asked.columns:
            if isinstance(self.asked.amount, float):
                self.choose_zeros(start, stop, self.asked.amount)
            self.settle(first, last)
        else:
            self.halves(first, (first + last + 1) // 2, last, self.edges, self.masks)

    def settle(self, first: int, last: int) -> None:
        """Does groups whose zeros are chosen."""
        if last - first == 1:
            self.choose_grid(first)
            self.within(first, self.edges[first], self.edges[last])
        else:
            self.halves(first, (first + last + 1) // 2, last, self.edges, self.settle)

    def within(self, group: int, start: int, stop: int) -> None:
        """Does inputs of a group whose grid is chosen; a pattern's zeros are chosen here."""
        unit, leaf = 1, _LEAF
        if isinstance(self.asked.amount, Nm):
            unit = leaf = self.asked.amount.of
        if stop - start <= leaf:
            if isinstance(self.asked.amount, Nm):
                self.choose_zeros(start, stop, self.asked.amount)
            self.leaf(group, start, stop)
            return

        def go(first: int, last: int) -> None:
            self.within(group, first, last)

        middle = start + unit * -(-(stop - start) // (2 * unit))
        self.halves(start, middle, stop, range(len(self.weight) + 1), go)

    def halves(
        self, first: int, middle: int, last: int, at: Sequence[int], go: Callable[[int, int], None]
    ) -> None:
        """Does the first half, subtracts its errors from the second, and does that."""
        go(first, middle)
        before, after = slice(at[first], at[middle]), slice(at[middle], at[last])
        upper = self.factor.upper[before, after]
        self.weight[after].addmm_(upper.T, self.errors[before], alpha=-1)
        go(middle, last)

    def choose_zeros(self, start: int, stop: int, amount: Amount) -> None:
        """Chooses the weights of these inputs that become zero."""
        scores, mask = self.scores[start:stop], self.mask[start:stop]
        torch.square(self.weight[start:stop], out=scores).mul_(self.worth[start:stop, None])
        scores.masked_fill_(mask, -1)  # zeros that were there go first
        if isinstance(amount, Nm):
            mask |= smallest_lanes_of(scores, amount)
            return
        for first, last in self.spans:
            count = count_of(amount, stop * (last - first)) - count_of(
                amount, start * (last - first)
            )
            own = scores[:, first:last].reshape(1, -1)
            mask[:, first:last] |= smallest(own, count).view(stop - start, -1)

    def choose_grid(self, group: int) -> None:
        """Chooses the scales, and zeros, of a group's outputs."""
        here = slice(self.edges[group], self.edges[group + 1])
        kept = self.weight[here].masked_fill(self.zeros_in(here), 0)
        rows = kept.T
        number, bits, symmetric = self.groups[group], self.asked.bits, self.asked.symmetric
        best: torch.Tensor | None = None
        for part in _PARTS if self.asked.search else _PARTS[:1]:
            scales, zeros = spanning(rows, bits, symmetric=symmetric, part=part)
            if best is None and not self.asked.search:
                self.put(number, scales, zeros)
                return
            low, high = self.limits(zeros)
            off = (kept / scales).round_().clamp_(low, high).mul_(scales).sub_(kept).square_()
            cost = self.worth[here] @ off
            better = cost < best if best is not None else torch.ones_like(cost, dtype=torch.bool)
            best = cost if best is None else torch.minimum(best, cost)
            self.put(number, scales, zeros, better)

    def zeros_in(self, here: slice) -> torch.Tensor:
        """The zeros of a group that is to get its grid; of a pattern, those expected by now."""
        if not isinstance(self.asked.amount, Nm):
            return self.mask[here]
        scores = self.weight[here].square().mul_(self.worth[here, None])
        return smallest_lanes_of(scores.masked_fill_(self.mask[here], -1), self.asked.amount)

    def put(
        self,
        number: int,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        where: torch.Tensor | None = None,
    ) -> None:
        """Takes scales and zeros for a group, of all outputs or some."""
        for held, new in ((self.scales[number], scales), (self.zeros[number], zeros)):
            if new is not None:
                held.copy_(new if where is None else torch.where(where, new, held))

    def limits(self, zeros: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest steps from zero that codes reach."""
        if zeros is None:
            zeros = torch.full((1,), 2 ** (self.asked.bits - 1), device=self.weight.device)
        return -zeros.float(), 2**self.asked.bits - 1 - zeros.float()

    def leaf(self, group: int, start: int, stop: int) -> None:
        """Does inputs one by one."""
        here = slice(start, stop)
        number = self.groups[group]
        scale = self.scales[number]
        low, high = self.limits(None if self.asked.symmetric else self.zeros[number])
        upper, weight = self.factor.upper[here, here], self.weight[here]
        kept = (~self.mask[here]).float().unbind(0)
        rows, errors = weight.unbind(0), self.errors[here].unbind(0)
        value = torch.empty_like(rows[0])
        for j in range(stop - start):
            torch.div(rows[j], scale, out=value)
            value.round_().clamp_(low, high).mul_(scale).mul_(kept[j])
            torch.sub(rows[j], value, out=errors[j]).mul_(self.inverse[start + j])
            if j + 1 < stop - start:
                weight[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
            rows[j].copy_(value).add_(0.0)  # no -0


def smallest_lanes_of(scores: torch.Tensor, nm: Nm) -> torch.Tensor:
    """Marks the least scores of each group of `nm.of` neighbouring rows, bool `[in, outputs]`."""
    lanes = scores.view(-1, nm.of, scores.shape[1]).transpose(0, 1).reshape(nm.of, -1)
    found = smallest_lanes(lanes, nm.of - nm.keep)
    return found.view(nm.of, -1, scores.shape[1]).transpose(0, 1).reshape(scores.shape)
