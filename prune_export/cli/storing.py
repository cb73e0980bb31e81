"""The commands `store ls` and `store gc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune_export.cli import console, options
from prune_export.cli.help import Command, Group
from prune_export.system.places import named
from prune_export.units import text_from_bytes

if TYPE_CHECKING:
    from prune_export.store import Store

store_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Look at the artifact store, or clean it."
)


@store_app.command("ls", cls=Command)
def store_ls(store: options.StoreDir = None, json: options.Json = False) -> None:
    """List what is in the store."""
    from datetime import datetime

    opened = _opened(store)
    found = list(opened.artifacts()) if opened else []
    if json:
        keys = ("id", "bytes", "changed", "complete")
        console.print_json([dict(zip(keys, row, strict=True)) for row in found])
        return
    rows = [
        (name, text_from_bytes(size), f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M}",
         "yes" if complete else "no")
        for name, size, when, complete in found
    ]  # fmt: skip
    console.table("", ["artifact", "size", "changed", "complete"], rows)
    console.output.put(f"{len(rows)} artifacts, {text_from_bytes(sum(row[1] for row in found))}")


@store_app.command("gc", cls=Command)
def store_gc(
    store: options.StoreDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: options.Json = False,
) -> None:
    """Delete what no result directory needs; what is being built now is left alone.

    What cannot be read goes too, and so do locks and temporary files that killed runs left.
    """
    from prune_export.system.temporary import sweep

    opened = _opened(store)
    sizes, doomed, broken, left = {}, [], [], []
    if opened is not None:
        sizes = {name: size for name, size, _, _ in opened.artifacts()}
        doomed, broken, left = opened.garbage(), opened.broken(), opened.stray()
        for name in () if dry_run else dict.fromkeys((*doomed, *broken, *left)):
            opened.remove(name)
    left += [] if dry_run else map(str, sweep())
    freed = sum(sizes.get(name, 0) for name in doomed)
    if json:
        console.print_json({"removed": doomed, "bytes": freed, "broken": broken,
                            "left_by_killed_runs": left, "dry_run": dry_run})  # fmt: skip
        return
    verb = "would remove" if dry_run else "removed"
    console.output.put(f"{verb} {len(doomed)} artifacts, {text_from_bytes(freed)}")
    if broken:
        console.output.put(f"{verb} what could not be read: {named(broken)}")
    if left:
        console.output.put(f"{verb} what killed runs had left: {named(left)}")


def _opened(given: Path | None) -> Store | None:
    """The store; None where none is named and the default one was never used."""
    from prune_export.store import Store

    root = options.store_directory(given)
    if given is None and not root.exists():
        return None
    return Store(root, make=False)
