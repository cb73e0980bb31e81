"""Sliding windows are exact for every weight of their pattern, and for no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_export.sparsity.nm import Nm
from prune_export.sparsity.slidesparse import (
    INPUTS_MULTIPLE,
    PATTERNS,
    bound,
    expanded,
    expanded_inputs,
    gather_index,
    holds,
    pattern_of,
    windows_for,
)


def every_mask(of: int) -> np.ndarray:
    """bool `[of, 2 ** of]`: each column is another choice of non-zeros."""
    return (np.arange(2**of) >> np.arange(of)[:, None] & 1).astype(bool)


def greedy(row: list[int], pattern: Nm) -> list[int] | None:
    """The windows of one group of one output, element by element; None where some are left."""
    left, found = list(row), []
    for window in range(pattern.of // 2 - 1):
        taken = 0
        for lane in range(2 * window, 2 * window + 4):
            takes = left[lane] != 0 and taken < 2
            found.append(left[lane] if takes else 0)
            taken += takes
            left[lane] = 0 if takes else left[lane]
    return None if any(left) else found


def sparse(rng: np.random.Generator, inputs: int, outputs: int, nm: Nm) -> np.ndarray:
    """Integers `[inputs, outputs]`, exactly `nm` non-zero where a group is whole."""
    groups = -(-inputs // nm.of)
    order = rng.random((groups, nm.of, outputs)).argsort(axis=1).argsort(axis=1)
    values = rng.integers(1, 100, (groups, nm.of, outputs)) * (order < nm.keep)
    return values.reshape(-1, outputs)[:inputs]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_weight_of_the_pattern_and_no_other_is_written_exactly(pattern: Nm) -> None:
    masks = every_mask(pattern.of)
    fit = masks.sum(axis=0) <= pattern.keep
    weight = masks[:, fit] * np.arange(1, pattern.of + 1)[:, None]
    wide = expanded(weight, pattern)
    windows = wide.reshape(-1, 4, wide.shape[1])
    assert ((windows != 0).sum(axis=1) <= 2).all(), "a window is not 2 of 4"
    index = gather_index(pattern.of, pattern)
    for lane in range(pattern.of):  # each weight once, at an input that is its own
        assert (wide[index == lane].sum(axis=0) == weight[lane]).all()
        assert ((wide[index == lane] != 0).sum(axis=0) == (weight[lane] != 0)).all()
    for column in np.flatnonzero(~fit):
        with pytest.raises(ValueError, match=f"more than {pattern.keep} of {pattern.of}"):
            expanded(masks[:, [column]], pattern)
        if pattern.of > 8:
            break  # one is enough where there are many; the small patterns try all


def test_six_of_eight_worked_by_hand() -> None:
    weight = np.array([[1, 0], [2, 0], [3, 30], [0, 40], [5, 50], [6, 60], [0, 70], [8, 80]])
    assert expanded(weight, Nm(6, 8))[:12].T.tolist() == [
        [1, 2, 0, 0, 3, 0, 5, 0, 0, 6, 0, 8],
        [0, 0, 30, 40, 0, 0, 50, 60, 0, 0, 70, 80],
    ]
    index = gather_index(8, Nm(6, 8))
    assert index[:12].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]
    assert len(index) == 32
    assert set(index[12:]) == {7}


@given(
    st.sampled_from(PATTERNS), st.integers(1, 70), st.integers(1, 9), st.integers(0, 2**32),
    st.sampled_from([np.float32, np.float64, np.float16, np.int8]),
)  # fmt: skip
def test_products_are_equal_and_windows_are_the_greedy_ones(
    pattern: Nm, inputs: int, outputs: int, seed: int, dtype: type
) -> None:
    rng = np.random.default_rng(seed)
    weight = sparse(rng, inputs, outputs, pattern).astype(dtype)
    wide = expanded(weight, pattern)
    turned = np.ascontiguousarray(weight.T).T  # as `[out, in]` is stored
    assert (expanded(turned, pattern) == wide).all()
    assert pattern_of(turned != 0) == pattern_of(weight != 0)
    assert wide.dtype == weight.dtype
    assert wide.shape == (expanded_inputs(inputs, pattern), outputs)
    assert len(wide) % INPUTS_MULTIPLE == 0
    x = rng.integers(-100, 100, (3, inputs))
    index = gather_index(inputs, pattern)
    assert (x[:, index] @ wide.astype(np.int64) == x @ weight.astype(np.int64)).all()
    groups = -(-inputs // pattern.of)
    whole = np.pad(weight, ((0, groups * pattern.of - inputs), (0, 0)))
    for output in range(outputs):
        cut = whole[:, output].reshape(groups, pattern.of)
        twin = [value for group in cut for value in greedy(group.tolist(), pattern) or []]
        assert wide[: len(twin), output].tolist() == twin


def test_pieces_are_one_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(np.random.default_rng(0), 61, 5, Nm(6, 8))
    whole = expanded(weight, Nm(6, 8))
    monkeypatch.setattr("prune_export.sparsity.slidesparse._CACHED", 1)
    assert (expanded(weight, Nm(6, 8)) == whole).all()
    assert (expanded(np.asfortranarray(weight), Nm(6, 8)) == whole).all()
    assert pattern_of(weight != 0) == Nm(6, 8)


def test_the_fastest_pattern_that_holds_is_chosen() -> None:
    rng = np.random.default_rng(0)
    assert pattern_of(sparse(rng, 64, 64, Nm(4, 8)) != 0) == Nm(6, 8)
    assert pattern_of(sparse(rng, 60, 64, Nm(4, 6)) != 0) == Nm(4, 6)
    assert pattern_of(sparse(rng, 64, 64, Nm(6, 8)) != 0) == Nm(6, 8)
    assert pattern_of(sparse(rng, 64, 640, Nm(14, 16)) != 0) == Nm(14, 16)
    assert pattern_of(np.ones((64, 64), bool)) is None


def test_holds_worked_by_hand() -> None:
    used = np.array([[1, 1], [0, 1], [0, 0], [1, 0], [1, 1]], bool)
    assert holds(used, Nm(2, 4))
    assert not holds(used, Nm(1, 4))
    assert not holds(used, Nm(1, 2))
    assert holds(used[:, :1], Nm(1, 2))


@pytest.mark.parametrize(
    ("nm", "wanted"),
    [
        (Nm(6, 8), Nm(6, 8)), (Nm(4, 8), Nm(6, 8)), (Nm(3, 4), Nm(6, 8)), (Nm(2, 4), Nm(6, 8)),
        (Nm(4, 6), Nm(4, 6)), (Nm(2, 3), Nm(4, 6)), (Nm(8, 16), Nm(14, 16)), (Nm(7, 8), Nm(14, 16)),
        (Nm(15, 16), None), (Nm(31, 32), None), (Nm(5, 7), Nm(12, 14)),
    ],
    ids=str,
)  # fmt: skip
def test_windows_for_a_pattern(nm: Nm, wanted: Nm | None) -> None:
    assert windows_for(nm) == wanted


@given(st.sampled_from([nm for of in range(2, 17) for nm in (Nm(k, of) for k in range(1, of))]))
def test_a_weight_holds_the_windows_that_its_pattern_is_sure_of(nm: Nm) -> None:
    weight = sparse(np.random.default_rng(0), 4 * nm.of, 50, nm)
    pattern = windows_for(nm)
    assert pattern is None or holds(weight != 0, pattern)


def test_bounds_are_those_of_the_paper() -> None:
    assert [round(bound(pattern), 2) for pattern in PATTERNS[:3]] == [1.5, 1.33, 1.25]
    assert expanded_inputs(4096, Nm(6, 8)) == 6144
    assert expanded_inputs(14336, Nm(8, 10)) == 22944  # 1434 groups of 16, to a multiple of 32
