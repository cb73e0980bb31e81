"""Which rows of a product over all families run by default; `--all-pairs` runs every row.

A test says it with a marker. `families("roles")`: a few families that have all roles of all tables
between them; `families("matrices")`: that have all layouts of matrices; `families("each", "mode")`:
each family once, with the next `mode` each time. ADR 0034 says why, and what is left to the whole.

`--few` (`make quick`) runs one row of every test, that in the middle; of a test marked
`every("name")` one row of each value of `name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from tests.arch.kinds import covering, matrices_of, roles_of

FACTS = {"roles": roles_of, "matrices": matrices_of}


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """What `--all-pairs` alone runs, and rows outside of the cover that their test asks for."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("families"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    rest = {item for item in items if item.get_closest_marker("all_pairs")}
    return rest.union(*(set(rows) - _cover(rows) for rows in tests.values()))


def all_but_few(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The rows that `--few` leaves out."""
    tests: dict[str, list[Any]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for rows in tests.values() for item in set(rows) - _few(rows)}


def _few(rows: list[Any]) -> set[Any]:
    marker = rows[0].get_closest_marker("every")
    if marker:
        return set({row.callspec.params[marker.args[0]]: row for row in reversed(rows)}.values())
    return {rows[len(rows) // 2]}


def _cover(rows: list[Any]) -> set[Any]:
    marker = rows[0].get_closest_marker("families")
    if marker.args[0] == "each":
        return _alternating(rows, marker.args[1])
    present = {row.callspec.params["model_type"] for row in rows}
    chosen = covering(present, FACTS[marker.args[0]])
    return {row for row in rows if row.callspec.params["model_type"] in chosen}


def _alternating(rows: list[Any], beside: str) -> set[Any]:
    """Of each family (and its variant) the row with another value of `beside` than the last's."""
    values = 1 + max(row.callspec.indices[beside] for row in rows)
    families = sorted({row.callspec.indices["model_type"] for row in rows})
    turn = {family: at % values for at, family in enumerate(families)}
    return {
        row
        for row in rows
        if row.callspec.indices[beside] == turn[row.callspec.indices["model_type"]]
    }
