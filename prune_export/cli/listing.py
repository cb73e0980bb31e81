"""The commands that list methods and their keys."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from prune_export import registry
from prune_export.cli import console, options
from prune_export.errors import PlanError, did_you_mean


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this one with its keys.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the pruning methods, healers and exporters, or show one with its keys.

    prune-export methods
    prune-export methods angular_distance
    """
    from prune_export.recipe.reference import described

    known = {kind: registry.names(kind) for kind in registry.KINDS}
    if name is None:
        found = [described(kind, entry) for kind in known for entry in known[kind]]
        if json:
            keys = ("kind", "name", "summary")
            console.print_json([{key: getattr(entry, key) for key in keys} for entry in found])
        else:
            shown = [(entry.name, entry.kind, entry.summary) for entry in found]
            console.table("", ["name", "kind", "what it does"], shown, left=[0, 1, 2])
        return
    kinds = [kind for kind in known if name in known[kind]]
    if not kinds:
        every = [entry for entries in known.values() for entry in entries]
        raise PlanError(name, "nothing is registered under this name", did_you_mean(name, every))
    entry = described(kinds[0], name)
    if json:
        console.print_json(dataclasses.asdict(entry))
        return
    console.output.put(entry.text + "\n")
    rows = [(key.name, key.type, key.default, key.help) for key in entry.keys]
    console.table("", ["key", "type", "default", "meaning"], rows, left=[0, 1, 2, 3])


def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    prune-export schema > prune_recipe.schema.json
    """
    from prune_export.recipe.reference import json_schema

    console.print_json(json_schema())
