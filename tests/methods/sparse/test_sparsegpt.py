"""SparseGPT's arithmetic against the column by column recipe of the paper, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.errors import PlanError, StageError
from prune_export.methods.sparse.sparsegpt import SparseGpt
from prune_export.pruning.sparse import obs_unstructured
from prune_export.pruning.sparse.masks import Amount, count_of, mask_of
from prune_export.sparsity.nm import Nm


def pruned(
    weight: torch.Tensor, gram: torch.Tensor, amount: Amount, columns: int
) -> obs_unstructured.Pruned:
    (found,) = obs_unstructured.prune(
        [weight], obs_unstructured.factor(gram, 0.01, "here"), amount, columns
    )
    return found


def gram_of(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """The Gram matrix of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, width, generator=random)
    states = states @ (torch.eye(width) + 0.3 * torch.randn(width, width, generator=random))
    return states.T @ states


def by_hand(
    weight: torch.Tensor, gram: torch.Tensor, amount: Amount, columns: int, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One column after the other; what is removed is chosen at the start of each group."""
    w, g = weight.double().clone(), gram.double().clone()
    width = len(g)
    g += damping * g.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(g), upper=True)
    step = amount.of if isinstance(amount, Nm) else columns
    mask = torch.zeros_like(w, dtype=torch.bool)
    for j in range(width):
        if j % step == 0:
            here = slice(j, min(j + step, width))
            scores = w[:, here] ** 2 / upper.diagonal()[here] ** 2
            if isinstance(amount, Nm):
                order = scores.argsort(dim=-1, stable=True)[:, : amount.of - amount.keep]
                mask[:, here] = mask[:, here].scatter(1, order, True)
            else:
                rows = len(w)
                count = count_of(amount, here.stop * rows) - count_of(amount, j * rows)
                order = scores.T.flatten().argsort(dim=0, stable=True)[:count]
                own = torch.zeros(scores.numel(), dtype=torch.bool)
                own[order] = True
                mask[:, here] = own.view(-1, rows).T
        error = torch.where(mask[:, j], w[:, j], 0) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
        w[mask[:, j], j] = 0
    return w, mask


@pytest.mark.parametrize("amount", [0.5, 0.3, Nm(2, 4), Nm(6, 8), Nm(1, 4)])
@pytest.mark.parametrize(("width", "columns"), [(72, 128), (96, 40), (200, 24)])
def test_it_is_the_paper_s_recipe(amount: Amount, width: int, columns: int) -> None:
    weight = torch.randn(19, width, generator=torch.Generator().manual_seed(1))
    gram = gram_of(400, width)
    expected, mask = by_hand(weight, gram, amount, columns, 0.01)
    found = pruned(weight, gram, amount, columns)
    assert torch.equal(found.kept, ~mask)
    torch.testing.assert_close(found.weight, expected.float(), atol=2e-4, rtol=2e-4)
    assert bool((found.weight[mask] == 0).all())


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
def test_the_factor_inverts_the_damped_gram_matrix(width: int) -> None:
    gram = gram_of(3 * width, width).double()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    upper = obs_unstructured.factor(gram.float(), 0.01, "here").upper.double()
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        upper.T @ upper @ damped, torch.eye(width, dtype=torch.float64), atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("amount", [0.4, Nm(2, 4)])
def test_matrices_of_the_same_inputs_are_pruned_as_if_alone(
    amount: Amount, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(4)
    weights = [torch.randn(rows, 96, generator=random) for rows in (7, 30, 11, 2)]
    factor = obs_unstructured.factor(gram_of(300, 96), 0.01, "here")
    monkeypatch.setattr(obs_unstructured, "_TOGETHER", 41 * 96)
    for weight, found in zip(
        weights, obs_unstructured.prune(weights, factor, amount, 40), strict=True
    ):
        (alone,) = obs_unstructured.prune([weight], factor, amount, 40)
        assert torch.equal(found.kept, alone.kept)
        torch.testing.assert_close(found.weight, alone.weight, atol=1e-5, rtol=1e-5)


def test_compensation_lowers_the_layer_s_error() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    gram = gram_of(500, 64)

    def error(new: torch.Tensor) -> float:
        return float(((new - weight) @ gram * (new - weight)).sum())

    found = pruned(weight, gram.clone(), 0.5, 128)
    assert error(found.weight) < 0.7 * error(weight.masked_fill(~found.kept, 0))
    assert error(found.weight) < error(weight.masked_fill(~mask_of(weight.abs(), 0.5), 0))


@settings(deadline=None, max_examples=25)
@given(
    amount=st.sampled_from([0.25, 0.5, 0.77, Nm(2, 4), Nm(4, 8), Nm(5, 6)]),
    rows=st.integers(1, 9),
    groups=st.integers(1, 9),
    columns=st.sampled_from([24, 48, 128]),
    seed=st.integers(0, 99),
)
def test_with_independent_inputs_it_is_magnitude_by_block_and_updates_nothing(
    amount: Amount, rows: int, groups: int, columns: int, seed: int
) -> None:
    width = 24 * groups
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    found = pruned(weight, torch.eye(width), amount, columns)
    assert torch.equal(found.weight, weight.masked_fill(~found.kept, 0))
    if isinstance(amount, Nm):
        assert torch.equal(found.kept, mask_of(weight.abs(), amount))
    else:
        assert int((~found.kept).sum()) == count_of(amount, weight.numel())
        for start in range(0, width, columns):
            stop = min(start + columns, width)
            part, mask = weight[:, start:stop].abs(), (~found.kept)[:, start:stop]
            count = count_of(amount, stop * rows) - count_of(amount, start * rows)
            assert int(mask.sum()) == count
            if 0 < count < mask.numel():
                assert part[mask].max() <= part[~mask].min()


def test_what_was_zero_stays_zero_and_what_was_never_seen_goes_first() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    weight[:, 5] = 0
    weight[2] = 0
    gram = gram_of(100, 32)
    gram[7], gram[:, 7] = 0, 0
    found = pruned(weight, gram, 0.4, 128)
    assert bool((found.weight[:, 5] == 0).all())
    assert bool((found.weight[2] == 0).all())
    assert bool((~found.kept)[:, 7].all())
    assert int((~found.kept).sum()) == count_of(0.4, 8 * 32)


def test_damping_is_raised_where_it_must_be_and_then_it_is_an_error() -> None:
    gram = gram_of(50, 6)
    # A Gram matrix has no such entries; rounding makes a little of this, and damping mends it.
    gram[0, 1] = gram[1, 0] = 1.04 * (gram[0, 0] * gram[1, 1]).sqrt()
    assert 0.01 < obs_unstructured.factor(gram.clone(), 0.01, "here").damping <= 1
    gram[0, 1] = gram[1, 0] = 10 * gram.diagonal().max()
    with pytest.raises(StageError, match=r"block 3[\s\S]*damping 1[\s\S]*exclude"):
        obs_unstructured.factor(gram.clone(), 0.01, "block 3, mlp.in")
    gram[0, 1] = gram[1, 0] = float("nan")
    with pytest.raises(StageError):
        obs_unstructured.factor(gram, 0.01, "here")


def test_columns_are_for_fractions() -> None:
    with pytest.raises(PlanError, match="columns"):
        SparseGpt(nm=Nm(2, 4), columns=64)
