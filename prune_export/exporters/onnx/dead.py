"""Removes the dead code of a block: what only adds zero.

A projection whose weights are zero makes zeros of whatever it reads. The zeros are followed to
where they are added to something, and what was computed only to be projected goes with them: a dead
attention takes its queries, keys, values and cache along. Where zeros reach an operator that is not
known here they are computed as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

_KEEPS_ZERO: Final = frozenset({
    "Cast", "ExpertOutput", "Expand", "Identity", "Neg", "Pow", "RMSNormalization", "ReduceMean",
    "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that make zeros of a first input of zeros."""
_KEEPS_ROW: Final = frozenset({"Identity", "Reshape"})
"""Operators of a block that leave a row, repeated over batch and positions, as it is."""


@dataclass(frozen=True)
class Live:
    """The nodes of a block that are not dead, in order, and aliases of values."""

    nodes: tuple[Any, ...]
    alias: dict[str, str]


def live(nodes: Sequence[Any], out: str, is_zero: Callable[[Any], bool]) -> Live:
    """Finds the `nodes` that the value `out` needs; `is_zero` says which weights are zeros."""
    zeros: set[str] = set()
    rows: set[str] = set()  # values that are a row repeated, and are given as the row alone
    alias: dict[str, str] = {}

    def zero(value: Any) -> bool:
        return value is not None and (value.name in zeros or is_zero(value))

    for node in nodes:
        read, made = node.inputs, node.outputs[0].name
        first = read[0].name if read and read[0] is not None else ""
        if node.op_type == "MatMul" and any(map(zero, read)):
            zeros.add(made)
        elif node.op_type in ("Add", "Mul") and any(map(zero, read)):
            other = next((value for value in read if not zero(value)), None)
            if node.op_type == "Mul" or other is None:
                zeros.add(made)
            else:
                alias[made] = alias.get(other.name, other.name)
                if other.shape is not None and len(other.shape) < 2:
                    rows.add(made)
        elif first in zeros and node.op_type in _KEEPS_ZERO:
            zeros.update(value.name for value in node.outputs)
        elif first in rows and node.op_type in _KEEPS_ROW:
            alias[made] = alias[first]
            rows.add(made)
    needed = tuple(_needed(nodes, alias.get(out, out), alias))
    return Live(needed[::-1], alias)


def _needed(nodes: Sequence[Any], out: str, alias: dict[str, str]) -> Iterator[Any]:
    """Keeps the nodes that `out` needs, going from the last to the first."""
    wanted = {out}
    for node in reversed(nodes):
        made = {value.name for value in node.outputs}
        if made & wanted:
            wanted |= {alias.get(value.name, value.name) for value in node.inputs if value}
            yield node
