"""Families by kind: whose blocks have the same roles, axes and norm differ in names and constants.

What is done to blocks is the same code for all families of a kind, so a matrix over methods takes
one family of each kind, another one in each row; a matrix whose rows cost seconds takes a few
families that have all facts of all tables between them (`covering`). That each family's table is
right is shown for each: names, shapes and logits in tests/arch, its graph in tests/exporters/onnx.
ADR 0034 says what such a cover leaves to `--all-pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import cache
from typing import Any, Final

from prune_export.arch.table import tables

HALF_BLOCKS: Final = frozenset({"nemotron_h"})
"""Families whose blocks are a mixer or an MLP alone: no part of a block goes, whole blocks do."""

Facts = Callable[[str], frozenset[Hashable]]


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


def roles_of(model_type: str) -> frozenset[Hashable]:
    """The roles of a family's weights, its kind of norm, and what its code does otherwise."""
    table = tables()[model_type]
    said = {key for key in ("parallel", "tuple_blocks", "tuple_mlp", "parts_add", "bundled")
            if getattr(table, key)}  # fmt: skip
    return frozenset({row.role for row in table.block} | {f"{table.norm} norm"} | said)


def matrices_of(model_type: str) -> frozenset[Hashable]:
    """The matrices of a family's blocks: their roles and how they are laid out."""
    rows = tables()[model_type].block
    return frozenset(
        (row.role, row.dims) for row in rows if " " in row.dims and not row.role.endswith(".bias")
    )


def covering(families: Iterable[str], facts: Facts) -> list[str]:
    """A few of the families that have all facts between them, those with the most first."""
    left = set().union(*map(facts, families := sorted(families)))
    chosen: list[str] = []
    while left:
        chosen.append(max(families, key=lambda one: (len(facts(one) & left), -len(facts(one)))))
        left -= facts(chosen[-1])
    return chosen
