"""The string that says what every dimension of a tensor means, and how to cut it.

    q_proj.weight        "(kv group dim) residual"     a product of axes, then a plain axis
    phi-3 gate_up_proj   "mlp+mlp residual"            a concatenation: gate rows, then up rows
    GPT-2 c_attn         "residual (3 kv dim)"         a number is an axis that is never cut
    a scalar             ""

Blanks separate dimensions, `+` concatenates inside a dimension, parentheses multiply, leftmost
outermost. That is enough for grouped queries, fused projections and transposed layouts, so none of
them needs code of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

Part = tuple[str, ...]
Dim = tuple[Part, ...]

_AXIS = r"(?:[A-Za-z_][A-Za-z0-9_.]*|[0-9]+)"
_PART = re.compile(
    rf"\s*(?P<part>{_AXIS}|\(\s*{_AXIS}(?:\s+{_AXIS})*\s*\))(?=[\s+]|$)(?P<plus>\s*\+)?"
)


@dataclass(frozen=True)
class Dims:
    """A parsed dims string: dimensions, each a concatenation of products of axes."""

    of: tuple[Dim, ...]

    @staticmethod
    def parse(text: str) -> Dims:
        """Reads a dims string.

        Raises:
            ValueError: the text is not one, with the position.
        """
        return Dims(tuple(_dims(text)))

    def __str__(self) -> str:
        return " ".join("+".join(_part_text(part) for part in dim) for dim in self.of)

    def axes(self) -> frozenset[str]:
        """The named axes that occur; numbers are not axes."""
        return self._axes

    @cached_property
    def _axes(self) -> frozenset[str]:
        return frozenset(
            axis for dim in self.of for part in dim for axis in part if not axis.isdecimal()
        )

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of the dimensions.

        Raises:
            KeyError: an axis has no size.
        """
        return tuple(sum(_length(part, sizes) for part in dim) for dim in self.of)

    def renamed(self, names: Mapping[str, str]) -> Dims:
        """The same dims with axes renamed, such as `mlp` to `mlp.3`."""
        return Dims(
            tuple(
                tuple(tuple(names.get(axis, axis) for axis in part) for part in dim)
                for dim in self.of
            )
        )

    def kept(
        self, axis: str, index: Sequence[int], sizes: Mapping[str, int]
    ) -> tuple[tuple[int, list[int]], ...]:
        """The positions of each dimension that survive when only `index` of `axis` is kept.

        Returns (dimension, positions kept in it) for each dimension that holds the axis; positions
        follow the order of `index`, so a permuted index permutes.

        Raises:
            ValueError: an index is outside the axis, or the axis stands twice in one product, which
                no cut can mean.
        """
        if any(not 0 <= number < sizes[axis] for number in index):
            raise ValueError(f"axis {axis!r} has size {sizes[axis]}, got index {list(index)}")
        found = []
        for number, dim in enumerate(self.of):
            if any(axis in part for part in dim):
                found.append((number, list(_positions(dim, axis, index, sizes))))
        return tuple(found)


def _positions(
    dim: Dim, axis: str, index: Sequence[int], sizes: Mapping[str, int]
) -> Iterator[int]:
    start = 0
    for part in dim:
        length = _length(part, sizes)
        if axis not in part:
            yield from range(start, start + length)
        else:
            if part.count(axis) > 1:
                raise ValueError(f"axis {axis!r} stands twice in {_part_text(part)}")
            at = part.index(axis)
            inner = _length(part[at + 1 :], sizes)
            step = inner * _length((axis,), sizes)
            for outer in range(start, start + length, step):
                for kept in index:
                    first = outer + kept * inner
                    yield from range(first, first + inner)
        start += length


def _length(part: Part, sizes: Mapping[str, int]) -> int:
    return prod(int(axis) if axis.isdecimal() else sizes[axis] for axis in part)


def _part_text(part: Part) -> str:
    return part[0] if len(part) == 1 else f"({' '.join(part)})"


def _dims(text: str) -> Iterator[Dim]:
    at, end = 0, len(text.rstrip())
    while at < end:
        dim: list[Part] = []
        joined = True
        while joined:
            match = _PART.match(text, at)
            if match is None:
                raise ValueError(
                    f"dims {text!r}: expected an axis, a number or (axes) after {text[:at]!r}"
                )
            dim.append(tuple(match["part"].strip("()").split()))
            at = match.end()
            joined = match["plus"] is not None
        yield tuple(dim)
