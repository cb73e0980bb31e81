"""Finds tables that are not of this package: of other packages, of directories, of a store.

- An entry point of the group `prune_export.families` names a package (`mine = "my_package"`); each
  `.yaml` file in it is a table. Names with `_` in front are left out.
- `PRUNE_EXPORT_FAMILIES` in the environment lists directories of such files, as PATH lists them;
  `--families DIR` adds one. Processes that are started from here inherit it.

Nothing in such a file is run: it is YAML, read as ours are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prune_export.errors import UnsupportedArch

if TYPE_CHECKING:
    from prune_export.arch.table import Table

VARIABLE: Final = "PRUNE_EXPORT_FAMILIES"
GROUP: Final = "prune_export.families"
_LONGEST: Final = 1 << 20
"""Bytes of a table; ours have up to 8,000."""


def directories() -> tuple[Path, ...]:
    """The directories that the environment lists."""
    return tuple(Path(one) for one in os.environ.get(VARIABLE, "").split(os.pathsep) if one)


def use(directory: Path) -> None:
    """Adds a directory of tables, for this process and those that it starts.

    Raises:
        UnsupportedArch: it is no directory.
    """
    if not directory.is_dir():
        raise UnsupportedArch(
            str(directory),
            "is no directory, expected one with a table of a family in each .yaml file",
            "write one: `prune-export families derive MODEL -o DIR/family.yaml`",
        )
    known = [str(one) for one in directories()]
    if (named := str(directory.resolve())) not in known:
        os.environ[VARIABLE] = os.pathsep.join([*known, named])


def joined(
    own: Mapping[str, Table], listed: str, parse: Callable[[str, str], Table]
) -> tuple[Mapping[str, Table], Mapping[str, tuple[Table, ...]]]:
    """All tables by model type, our `own` ones included, and by model type those derived.

    A derived table gives way to one written by hand; it holds for the transformers that it was
    proven with, and no other.

    Raises:
        UnsupportedArch: a table is malformed, or two describe one model type.
    """
    found, origin = dict(own), dict.fromkeys(own, "prune_export itself")
    derived: dict[str, tuple[Table, ...]] = {}
    for where, text in texts(listed):
        table = parse(text, where)
        for model_type in table.model_types:
            if table.derived is not None:
                if table.derived.transformers == _transformers():
                    derived[model_type] = (*derived.get(model_type, ()), table)
                continue
            if model_type in found:
                raise UnsupportedArch(
                    f"{where}  model_types",
                    f"{model_type!r} is described already, by {origin[model_type]}",
                    "remove one of the two tables",
                )
            found[model_type], origin[model_type] = table, where
    derived = {name: tables for name, tables in derived.items() if name not in found}
    return {**found, **{name: tables[0] for name, tables in derived.items()}}, derived


def _transformers() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def texts(listed: str) -> Iterator[tuple[str, str]]:
    """Every table from outside: where it lies, and its text; `listed` is the environment's word.

    Raises:
        UnsupportedArch: a directory is not there, a package cannot be imported, or a file is no
            text, or far too long.
    """
    for entry in entry_points(group=GROUP):
        try:
            folder = files(entry.value)
        except Exception as error:  # whatever a package raises when it is imported
            raise UnsupportedArch(
                f"families: {entry.name}",
                f"{entry.value} cannot be imported: {type(error).__name__}: {error}",
                "mend or upgrade that package, or uninstall it",
            ) from error
        yield from _of(folder, entry.value)
    for place in filter(None, listed.split(os.pathsep)):
        if not Path(place).is_dir():
            raise UnsupportedArch(
                place, f"is no directory, but {VARIABLE} or --families names it", "correct it"
            )
        yield from _of(Path(place), place)


def _of(folder: Traversable, name: str) -> Iterator[tuple[str, str]]:
    for entry in sorted(folder.iterdir(), key=lambda one: one.name):
        if not entry.name.endswith(".yaml") or entry.name.startswith(("_", ".")):
            continue
        where = f"{name}/{entry.name}"
        if not entry.is_file():
            raise UnsupportedArch(where, "is no regular file", "remove it, or write a table")
        with entry.open("rb") as stream:
            raw = stream.read(_LONGEST + 1)
        if len(raw) > _LONGEST:
            raise UnsupportedArch(where, f"has over {_LONGEST:,} bytes: it is no table")
        try:
            yield where, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnsupportedArch(where, f"is not UTF-8: {error}") from None
