from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.arch import Dims

AXES = ["a", "b", "c", "d.3"]


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", ()),
        ("b", (5,)),
        ("(a b) c", (15, 2)),
        ("c (a d.3 b)", (2, 60)),
        ("b+b c", (10, 2)),
        ("2+b c", (7, 2)),
        ("(a b)+a+( 2 c ) c", (22, 2)),
        ("  c   b ", (2, 5)),
    ],
)
def test_shape(text: str, shape: tuple[int, ...]) -> None:
    dims = Dims.parse(text)
    assert dims.shape({"a": 3, "b": 5, "c": 2, "d.3": 4}) == shape
    assert Dims.parse(str(dims)) == dims


@pytest.mark.parametrize(
    "text",
    ["(", "(a", "a)", "()", "(a (b))", "+a", "a+", "a + + b", "a(b)", "(a)b", "a-b", "2x", "a,b"],
)
def test_what_is_no_dims_string_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"dims .* expected an axis"):
        Dims.parse(text)


def test_axes_are_named_and_numbers_are_not() -> None:
    assert Dims.parse("(3 kv dim) residual+2").axes() == {"kv", "dim", "residual"}


def test_renamed() -> None:
    dims = Dims.parse("(kv dim)+mlp residual").renamed({"kv": "kv.7", "mlp": "mlp.7"})
    assert str(dims) == "(kv.7 dim)+mlp.7 residual"


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(KeyError, match="b"):
        Dims.parse("a b").shape({"a": 1})


def test_an_index_outside_the_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="size 3"):
        Dims.parse("a").kept("a", [0, 3], {"a": 3})


def test_an_axis_twice_in_one_product_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match="twice"):
        Dims.parse("(a b a)").kept("a", [0], {"a": 3, "b": 2})


def test_what_does_not_hold_the_axis_is_left_alone() -> None:
    assert Dims.parse("a+2 b").kept("c", [0], {"a": 3, "b": 2, "c": 4}) == ()


def parts() -> st.SearchStrategy[str]:
    axis = st.sampled_from([*AXES, "1", "2", "3"])
    product = st.lists(axis, min_size=1, max_size=4, unique=True)
    return product.map(lambda axes: f"({' '.join(axes)})" if len(axes) > 1 else axes[0])


texts = st.lists(
    st.lists(parts(), min_size=1, max_size=3).map("+".join), min_size=1, max_size=3
).map(" ".join)


@given(text=texts, data=st.data())
@settings(max_examples=200, deadline=None)
def test_kept_is_what_numpy_keeps(text: str, data: st.DataObject) -> None:
    sizes = {axis: data.draw(st.integers(1, 4)) for axis in AXES}
    axis = data.draw(st.sampled_from(AXES))
    index = data.draw(st.lists(st.integers(0, sizes[axis] - 1), max_size=sizes[axis], unique=True))
    dims = Dims.parse(text)
    tensor = np.arange(prod(dims.shape(sizes))).reshape(dims.shape(sizes))
    cut = tensor
    for dimension, positions in dims.kept(axis, index, sizes):
        cut = np.take(cut, positions, axis=dimension)
    np.testing.assert_array_equal(cut, brute_force(text, tensor, axis, index, sizes))
    assert cut.shape == dims.shape({**sizes, axis: len(index)})


def brute_force(
    text: str, tensor: np.ndarray, axis: str, index: list[int], sizes: dict[str, int]
) -> np.ndarray:
    """Splits each dimension at `+`, unfolds its products, takes, folds and joins again."""
    for dimension, word in enumerate(dimensions(text)):
        pieces, start = [], 0
        for part in word.split("+"):
            axes = part.strip("()").split()
            lengths = [sizes.get(name) or int(name) for name in axes]
            piece = np.take(tensor, range(start, start + prod(lengths)), axis=dimension)
            start += prod(lengths)
            if axis in axes:
                before, after = tensor.shape[:dimension], tensor.shape[dimension + 1 :]
                unfolded = piece.reshape(*before, *lengths, *after)
                taken = np.take(unfolded, index, axis=dimension + axes.index(axis))
                lengths[axes.index(axis)] = len(index)
                piece = taken.reshape(*before, prod(lengths), *after)
            pieces.append(piece)
        tensor = np.concatenate(pieces, axis=dimension)
    return tensor


def dimensions(text: str) -> list[str]:
    """The text of each dimension: what blanks outside parentheses separate."""
    depth, words = 0, [""]
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == " " and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    return words
