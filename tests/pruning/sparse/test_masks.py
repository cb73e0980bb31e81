"""Masks against a stable sort: exact counts, the least scores, of equal ones the first."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.errors import StageError
from prune_export.pruning.sparse import masks as masks_module
from prune_export.pruning.sparse.masks import Amount, count_of, keep_only, mask_of, summary
from prune_export.pruning.sparse.threshold import limit_of
from prune_export.sparsity.nm import Nm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_sorting(scores: torch.Tensor, amount: Amount, compare: str) -> torch.Tensor:
    """Every comparison group sorted by itself."""
    rows, width = scores.shape
    if isinstance(amount, Nm):
        groups, count = scores.reshape(-1, amount.of), amount.of - amount.keep
    elif compare == "matrix":
        groups, count = scores.reshape(1, -1), count_of(amount, rows * width)
    else:
        groups, count = scores, count_of(amount, width)
    found = torch.zeros_like(groups, dtype=torch.bool)
    found.scatter_(1, groups.argsort(dim=1, stable=True)[:, :count], True)
    return found.view(rows, width)


amounts = st.one_of(
    st.floats(0.01, 0.99),
    st.integers(2, 16).flatmap(lambda of: st.builds(Nm, st.integers(1, of - 1), st.just(of))),
)


@settings(deadline=None, max_examples=150)
@given(
    amount=amounts,
    rows=st.integers(1, 7),
    groups=st.integers(1, 5),
    ties=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from(DTYPES),
    compare=st.sampled_from(["row", "matrix"]),
    seed=st.integers(0, 999),
)
def test_exactly_the_least_become_zero(
    amount: Amount, rows: int, groups: int, ties: int, dtype: torch.dtype, compare: str, seed: int
) -> None:
    width = groups * (amount.of if isinstance(amount, Nm) else 11)
    random = torch.Generator().manual_seed(seed)
    weight = torch.randint(-ties, ties + 1, (rows, width), generator=random).to(dtype)
    scores = weight.abs().float()
    kept = mask_of(scores, amount, compare)
    mask = ~kept
    assert torch.equal(mask, by_sorting(scores, amount, compare))
    pruned = keep_only(weight.clone(), kept)
    assert pruned.dtype == dtype
    assert torch.equal(pruned, weight.masked_fill(mask, 0))
    assert not bool(pruned[mask].signbit().any()), "zero, not minus zero"


def test_groups_are_cut_alike_where_they_do_not_fit_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.rand(13, 64, generator=torch.Generator().manual_seed(0))
    whole = mask_of(scores, Nm(3, 8))
    monkeypatch.setattr(masks_module, "_CACHED", 10)
    assert torch.equal(mask_of(scores, Nm(3, 8)), whole)


def test_a_count_is_what_the_fraction_says() -> None:
    assert [count_of(0.35, 20), count_of(0.5, 7), count_of(0.3, 10), count_of(0.999, 10)] == [
        7,
        3,
        3,
        9,
    ]


@pytest.mark.parametrize("amount", [0.5, Nm(2, 4)])
def test_scores_that_are_not_numbers_are_refused(amount: Amount) -> None:
    scores = torch.rand(3, 8)
    scores[1] = float("nan")
    with pytest.raises(StageError, match="not numbers"):
        mask_of(scores, amount)


def test_the_summary_is_of_this_mask() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 4.0], [0.0, 3.0, 2.0, 0.1]])
    mask = mask_of(weight.abs(), Nm(2, 4))
    found = summary(keep_only(weight.clone(), mask), weight.abs(), kept=mask)
    kept = np.array([[0, 1, 0, 1], [0, 1, 1, 0]], dtype=bool)
    assert found["digest"] == hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()
    assert (found["zeros"], found["weights"], found["sparsity"]) == (4, 8, 0.5)
    assert found["score_quantiles"][0] == 0
    assert found["score_quantiles"][-1] == 4


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    fraction=st.floats(0.05, 0.99),
    ties=st.sampled_from([1, 4, 100000]),
    seed=st.integers(0, 99),
)
def test_the_least_of_a_model_are_found_without_holding_it(
    sizes: list[int], fraction: float, ties: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    parts = [torch.randint(0, ties + 1, (size, 3), generator=random) / 7 for size in sizes]
    count = max(1, count_of(fraction, 3 * sum(sizes)))
    limit, masks = limit_of(lambda: parts, count), []
    for part in parts:
        mask, limit = limit.least(part)
        masks.append(mask.flatten())
    expected = torch.zeros(3 * sum(sizes), dtype=torch.bool)
    expected[torch.cat([part.flatten() for part in parts]).argsort(dim=0, stable=True)[:count]] = 1
    assert torch.equal(torch.cat(masks), expected)
    assert limit.equal == 0
