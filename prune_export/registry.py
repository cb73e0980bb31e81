"""Finds methods, healers and exporters by the names of their files and packages.

Below `methods`, a package is a family and each module in it a method: `methods/sparse/wanda.py` is
`method: wanda`. `exporters/onnx/` is `export: onnx`. A third party adds one through the entry-point
groups `prune_export.methods`, `.quantize`, `.heal` and `.exporters`, each entry naming the class.
In a module or package of ours, the one public class with a `VERSION` is the entry.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal

from prune_export.errors import PlanError, did_you_mean

Kind = Literal["methods", "quantize", "heal", "exporters"]
KINDS: Final[tuple[Kind, ...]] = ("methods", "quantize", "heal", "exporters")


@cache
def names(kind: Kind) -> tuple[str, ...]:
    """Lists every registered name of a kind, sorted, without importing any of them."""
    return tuple(sorted({*_modules(kind), *_plugins(kind)}))


@cache
def find(kind: Kind, name: str) -> Any:
    """Imports the class registered as `name`.

    Raises:
        PlanError: no such name or two of it, a module that does not define exactly one entry, or a
            plug-in that cannot be imported or is no frozen dataclass with a `VERSION`.
    """
    _refuse_second(kind, name)
    if (path := _modules(kind).get(name)) is not None:
        module = importlib.import_module(path)
        own = [
            value
            for key, value in vars(module).items()
            if isinstance(value, type)
            and not key.startswith("_")
            and f"{value.__module__}.".startswith(f"{path}.")
            and "VERSION" in vars(value)
        ]
        if len(own) != 1:
            raise PlanError(
                path,
                f"defines {len(own)} public classes with a VERSION, expected exactly 1",
                "keep one public entry class in the file; start the others' names with `_`",
            )
        return own[0]
    if name in _plugins(kind):
        return _loaded(kind, _plugins(kind)[name][0])
    raise PlanError(
        f"{kind}: {name}", f"nothing is registered as `{name}`", did_you_mean(name, names(kind))
    )


@cache
def _modules(kind: Kind) -> dict[str, str]:
    """Finds the dotted path of each built-in entry, by its name.

    Raises:
        PlanError: two entries have one name.
    """
    found: dict[str, str] = {}
    for path in _entries(f"prune_export.{kind}", with_rooms=kind == "methods"):
        name = path.rpartition(".")[2]
        if name in found:
            raise PlanError(
                f"{kind}: {name}",
                f"{found[name]} and {path} have the same name",
                "rename one of the files",
            )
        found[name] = path
    return found


def _entries(package: str, *, with_rooms: bool) -> Iterator[str]:
    """Lists the dotted paths of a package's public modules, those of its families included."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        path = f"{package}.{module.name}"
        if module.name.startswith("_"):
            continue
        if with_rooms and module.ispkg:
            yield from _entries(path, with_rooms=False)
        else:
            yield path


def _loaded(kind: Kind, entry: EntryPoint) -> Any:
    """The class that an entry point of a third party names.

    Raises:
        PlanError: it cannot be imported, or is no frozen dataclass with a `VERSION`.
    """
    source = f" of {entry.dist.name}" if entry.dist else ""
    where = f"{kind}: {entry.name}"
    try:
        found = entry.load()
    except Exception as error:  # whatever a module raises when it is imported
        raise PlanError(
            where,
            f"{entry.value}{source} cannot be imported: {type(error).__name__}: {error}",
            "mend or upgrade that package, or uninstall it",
        ) from error
    frozen = dataclasses.is_dataclass(found) and found.__dataclass_params__.frozen  # type: ignore[union-attr]
    if not (isinstance(found, type) and frozen and hasattr(found, "VERSION")):
        raise PlanError(
            where,
            f"{entry.value}{source} is no frozen dataclass with a `VERSION`",
            "name the class itself in the entry point; docs/your-own.md shows one of each kind",
        )
    return found


def _refuse_second(kind: Kind, name: str) -> None:
    """Refuses a name that does not say which of two entries is meant.

    Raises:
        PlanError: naming who brings them.
    """
    brought = sorted(
        f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})"
        for entry in _plugins(kind).get(name, ())
    )
    if name in _modules(kind):
        brought.insert(0, "prune_export itself")
    if len(brought) > 1:
        raise PlanError(
            f"{kind}: {name}",
            f"is the name of {len(brought)} entries: of {' and of '.join(brought)}",
            "rename the entry point of the plug-in, or uninstall one of the packages",
        )


@cache
def _plugins(kind: Kind) -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=f"prune_export.{kind}"):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found
