"""`prune-export store`: what is kept, and what nothing needs any more."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_export.cli import console, options
from prune_export.cli.help import Command, Group
from prune_export.units import text_from_bytes

store_app = typer.Typer(
    cls=Group, no_args_is_help=True, help="Look at the artifact store, or clean it."
)


@store_app.command("ls", cls=Command)
def store_ls(store: options.StoreDir = None, json: options.Json = False) -> None:
    """List what is in the store."""
    from datetime import datetime

    from prune_export.store import Store

    found = list(Store(options.store_directory(store)).artifacts())
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
    """Delete what no result directory needs; what is being built now is left alone."""
    from prune_export.store import Store

    opened = Store(options.store_directory(store))
    sizes = {name: size for name, size, _, _ in opened.artifacts()}
    doomed = opened.garbage()
    for name in doomed:
        if not dry_run:
            opened.remove(name)
    freed = sum(sizes[name] for name in doomed)
    if json:
        console.print_json({"removed": doomed, "bytes": freed, "dry_run": dry_run})
    else:
        verb = "would remove" if dry_run else "removed"
        console.output.put(f"{verb} {len(doomed)} artifacts, {text_from_bytes(freed)}")
