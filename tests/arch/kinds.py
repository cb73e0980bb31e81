"""Families by kind: whose blocks have the same roles, axes and norm differ in names and constants.

What is done to blocks is the same code for all families of a kind, so a matrix over methods or
precisions takes one family of each kind, another one in each row. That each family's table is right
is shown for each: names, shapes and logits in tests/arch, its graph in tests/exporters/onnx.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prune_export.arch.table import tables


@cache
def kinds() -> tuple[tuple[str, ...], ...]:
    """All families, those of a kind together."""
    found: dict[Any, list[str]] = {}
    for model_type in sorted(tables()):
        table = tables()[model_type]
        rows = tuple(
            (row.role, row.dims, row.layers)
            for row in table.block
            if not row.role.endswith(".bias")
        )
        found.setdefault((table.norm, rows, table.bundled is not None), []).append(model_type)
    return tuple(map(tuple, found.values()))


def one_of_each(turn: int = 0) -> list[str]:
    """One family of each kind, the next one of a kind for the next `turn`."""
    return sorted(kind[turn % len(kind)] for kind in kinds())
