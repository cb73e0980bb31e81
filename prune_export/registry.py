"""Finds methods, healers and exporters: the file name is the registry.

`prune_export/methods/wanda.py` is `method: wanda`. A third party adds one through the entry-point
groups `prune_export.methods`, `prune_export.heal` and `prune_export.exporters`, each entry naming
the class. In a module of ours, the one public class with a `VERSION` is the entry.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal

from prune_export.errors import PlanError, did_you_mean

Kind = Literal["methods", "heal", "exporters"]
KINDS: Final[tuple[Kind, ...]] = ("methods", "heal", "exporters")


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Every registered name of a kind, sorted, without importing any of them."""
    return tuple(sorted({*_modules(kind), *_plugins(kind)}))


@cache
def find(kind: Kind, name: str) -> Any:
    """The class registered as `name`.

    Raises:
        PlanError: no such name, or a module that does not define exactly one entry.
    """
    if name in _modules(kind):
        module = importlib.import_module(f"prune_export.{kind}.{name}")
        own = [
            value
            for key, value in vars(module).items()
            if isinstance(value, type)
            and not key.startswith("_")
            and value.__module__ == module.__name__
            and "VERSION" in vars(value)
        ]
        if len(own) != 1:
            raise PlanError(
                f"prune_export.{kind}.{name}",
                f"defines {len(own)} public classes with a VERSION, expected exactly 1",
                "keep one public entry class in the file; start the others' names with `_`",
            )
        return own[0]
    if name in _plugins(kind):
        return _plugins(kind)[name].load()
    raise PlanError(
        f"{kind}: {name}", f"nothing is registered as `{name}`", did_you_mean(name, names(kind))
    )


@cache
def _modules(kind: Kind) -> frozenset[str]:
    package = importlib.import_module(f"prune_export.{kind}")
    return frozenset(
        module.name
        for module in pkgutil.iter_modules(package.__path__)
        if not module.name.startswith("_")
    )


@cache
def _plugins(kind: Kind) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"prune_export.{kind}")}
