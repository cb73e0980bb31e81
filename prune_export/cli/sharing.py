"""The command `recipes`: the bundled ones, and those that others have put on the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from prune_export.cli import console, options
from prune_export.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from prune_export.recipe import Recipe


def recipes(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME | search WORDS | show RECIPE]",
            help="Print this bundled recipe; search the Hub; or print any recipe.",
        ),
    ] = None,
    allow_owner: options.Owners = None,
    json: options.Json = False,
) -> None:
    """List the bundled recipes, or print one; find those of others on the Hub.

    prune-export recipes
    prune-export recipes demo > mine.yaml
    prune-export recipes search llama wanda
    prune-export recipes show hf://me/Llama-3.1-8B-depth60
    """
    from prune_export.recipe import Recipe, bundled

    known = bundled()
    asked = words or []
    if not asked:
        found = {key: Recipe.load(key).description for key in known}
        if json:
            console.print_json(found)
        else:
            console.table("", ["recipe", "what it does"], list(found.items()), left=[0, 1])
    elif asked[0] == "search":
        _search(asked[1:], json=json)
    elif asked[0] == "show" and len(asked) == 2:
        _show(asked[1], allow_owner or (), json=json)
    elif len(asked) == 1 and asked[0] in known:
        console.output.put(known[asked[0]].read_text(encoding="utf-8").rstrip("\n"))
    elif len(asked) == 1:
        raise RecipeError(asked[0], "is not a bundled recipe", did_you_mean(asked[0], known))
    else:
        raise RecipeError(
            " ".join(asked),
            "is more than one word",
            "write `recipes NAME`, `recipes search WORDS` or `recipes show RECIPE`",
        )


def announce(recipe: Recipe, model: str | None, *, own_data: bool) -> None:
    """Says on standard error what a recipe of the Hub would fetch, before anything of it is."""
    from prune_export.recipe.fetching import fetches

    if recipe.fetched:
        for line in fetches(recipe, model, own_data=own_data):
            console.errors.put(console.errors.flat(f"the recipe fetches {line}"))


def _search(words: Sequence[str], *, json: bool) -> None:
    from prune_export.hub.recipes import search

    found = search(words)
    if json:
        console.print_json([dataclasses.asdict(one) for one in found])
        return
    rows = [(one.address, one.base, f"{one.downloads:,}") for one in found]
    console.table("", ["recipe", "run on", "downloads"], rows, left=[0, 1])


def _show(spec: str, allow: Sequence[str], *, json: bool) -> None:
    from prune_export.recipe import Recipe
    from prune_export.recipe.fetching import fetches

    recipe = Recipe.load(spec, allow=allow)
    needed = fetches(recipe)
    if json:
        console.print_json({"recipe": recipe.to_dict(), "fetches": needed})
        return
    console.output.put(recipe.text.rstrip("\n"))
    for line in needed:
        console.errors.put(console.errors.flat(f"the recipe fetches {line}"))
