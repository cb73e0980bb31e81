"""GPTQ's arithmetic against the input by input recipe of the paper, in float64."""

from __future__ import annotations

import pytest
import torch

from prune_export.grids import Grid, spanning
from prune_export.pruning.quantize.sweep import Asked, Quantized, processing_order, quantize
from prune_export.pruning.sparse import obs_unstructured
from prune_export.pruning.sparse.masks import Amount, count_of
from prune_export.sparsity.nm import Nm
from tests.methods.sparse.test_sparsegpt import gram_of


def quantized(weight: torch.Tensor, gram: torch.Tensor, asked: Asked, acts: bool) -> Quantized:
    order = torch.arange(len(gram))
    if acts:
        unit = asked.amount.of if isinstance(asked.amount, Nm) else 1
        order = processing_order(gram.diagonal(), asked.group_size, unit)
    factor = obs_unstructured.factor(gram[order][:, order].clone(), 0.01, "here")
    (found,) = quantize([weight], factor, order, asked)
    return found


def by_hand(weight: torch.Tensor, gram: torch.Tensor, asked: Asked, acts: bool) -> torch.Tensor:
    """One input after the other; a group's scales, and zeros, are chosen at its first one."""
    width, size = len(gram), asked.group_size
    order = list(range(width))
    if acts:
        heavy = gram.diagonal().tolist()
        unit = asked.amount.of if isinstance(asked.amount, Nm) else 1
        of_unit = [sum(heavy[at : at + unit]) for at in range(0, width, unit)]
        of_group = [sum(heavy[at : at + size]) for at in range(0, width, size)]
        order.sort(key=lambda j: (-of_group[j // size], -of_unit[j // unit]))
    w = weight.double()[:, order]
    g = gram.double()[order][:, order]
    g += 0.01 * g.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(g), upper=True)
    mask = w == 0
    low, high = torch.tensor(0.0), torch.tensor(0.0)
    scale, group, ready = torch.ones(len(w)), -1, 0
    for j in range(width):
        if order[j] // size != group:
            group = order[j] // size
            here = [k for k in range(width) if order[k] // size == group]
            if isinstance(asked.amount, float) and j >= ready:
                ready = here[-1] + 1
                while ready < width:  # whole groups, up to so many inputs
                    after = [k for k in range(width) if order[k] // size == order[ready] // size]
                    if after[-1] + 1 - j > asked.columns:
                        break
                    ready = after[-1] + 1
                span = slice(j, ready)
                scores = w[:, span] ** 2 / upper.diagonal()[span] ** 2
                mask[:, span] |= chosen(scores, asked.amount, j, ready)
            gone = mask[:, here]
            if isinstance(asked.amount, Nm):
                scores = w[:, here] ** 2 / upper.diagonal()[here] ** 2
                gone = gone | chosen(scores, asked.amount, 0, 0)
            rows = torch.where(gone, 0, w[:, here])
            scale, zeros = spanning(rows.float(), asked.bits, symmetric=asked.symmetric)
            zero = torch.tensor(2.0 ** (asked.bits - 1)) if zeros is None else zeros.double()
            low, high = -zero, 2**asked.bits - 1 - zero
        if isinstance(asked.amount, Nm) and j % asked.amount.of == 0:
            span = slice(j, j + asked.amount.of)
            scores = w[:, span] ** 2 / upper.diagonal()[span] ** 2
            mask[:, span] |= chosen(scores, asked.amount, 0, 0)
        value = (w[:, j] / scale).round().clamp(low, high) * scale
        value = torch.where(mask[:, j], 0, value)
        error = (w[:, j] - value) / upper[j, j]
        w[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
        w[:, j] = value
    back = torch.tensor(order).argsort()
    return w[:, back]


def chosen(scores: torch.Tensor, amount: Amount, start: int, stop: int) -> torch.Tensor:
    found = torch.zeros(scores.shape, dtype=torch.bool)
    if isinstance(amount, Nm):
        for at in range(0, scores.shape[1], amount.of):
            least = scores[:, at : at + amount.of].argsort(dim=-1, stable=True)
            found[:, at : at + amount.of].scatter_(1, least[:, : amount.of - amount.keep], True)
        return found
    rows = len(scores)
    count = count_of(amount, stop * rows) - count_of(amount, start * rows)
    flat = torch.zeros(scores.numel(), dtype=torch.bool)
    flat[scores.T.flatten().argsort(stable=True)[:count]] = True
    return flat.view(-1, rows).T


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("amount", [None, 0.5, Nm(2, 4)])
@pytest.mark.parametrize(("width", "group_size"), [(72, 32), (96, 16), (200, 64)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_the_paper_s_recipe(
    amount: Amount | None, width: int, group_size: int, symmetric: bool, acts: bool
) -> None:
    weight = torch.randn(19, width, generator=torch.Generator().manual_seed(1))
    gram = gram_of(400, width)
    asked = Asked(4, group_size, symmetric, False, amount)
    found = quantized(weight, gram, asked, acts)
    expected = by_hand(weight, gram, asked, acts).float()
    # A rounding that is a tie in one arithmetic may fall otherwise in the other, and moves what
    # comes after it in its row: none does in these draws.
    torch.testing.assert_close(found.weight, expected, atol=1e-3, rtol=1e-3)
    assert bool((found.weight[found.mask] == 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_lie_on_the_grid_exactly_and_zeros_stay(bits: int, symmetric: bool) -> None:
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(2))
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.3] = 0
    found = quantized(weight, gram_of(300, 80), Asked(bits, 32, symmetric, True), True)
    codes = found.grid.codes(found.weight)
    assert torch.equal(found.grid.values(codes), found.weight)
    assert bool((found.weight[weight == 0] == 0).all())
    assert torch.equal(found.grid.scales, found.grid.scales.half().float())
    assert int(codes.max()) < 2**bits


def test_it_loses_less_than_rounding_and_searching_for_scales_less_again() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(4))
    gram = gram_of(600, 128)

    def lost(found: torch.Tensor) -> float:
        off = found - weight
        return float((off @ gram * off).sum())

    scales, zeros = spanning(weight.view(64, 4, 32), 4, symmetric=False)
    grid = Grid(4, 32, scales, zeros)
    nearest = lost(grid.values(grid.codes(weight)))
    plain, ordered, searched = (
        lost(quantized(weight, gram, Asked(4, 32, False, search), acts).weight)
        for search, acts in ((False, False), (False, True), (True, True))
    )
    assert plain < 0.5 * nearest
    assert ordered < 1.02 * plain  # these inputs are about equally heavy
    assert searched < ordered


def test_zeros_and_codes_in_one_sweep_lose_no_more_than_one_after_the_other() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    gram = gram_of(600, 128)

    def lost(found: torch.Tensor) -> float:
        off = found - weight
        return float((off @ gram * off).sum())

    both = quantized(weight, gram, Asked(4, 32, False, True, Nm(2, 4)), False)
    factor = obs_unstructured.factor(gram.clone(), 0.01, "here")
    (zeroed,) = obs_unstructured.prune([weight], factor, Nm(2, 4), 128)
    after = quantized(zeroed.weight, gram, Asked(4, 32, False, True), False)
    assert bool((both.mask.view(64, -1, 4).sum(-1) == 2).all())
    assert lost(both.weight) < 1.05 * lost(after.weight)


def test_groups_stay_together_in_the_order_of_their_inputs() -> None:
    diagonal = torch.tensor([1.0, 9, 2, 2, 5, 1, 7, 1, 3, 3])
    assert processing_order(diagonal, 4, 1).tolist() == [1, 2, 3, 0, 6, 4, 5, 7, 8, 9]
    assert processing_order(diagonal, 4, 2).tolist() == [0, 1, 2, 3, 6, 7, 4, 5, 8, 9]
    assert processing_order(torch.ones(6), 2, 1).tolist() == [0, 1, 2, 3, 4, 5]
