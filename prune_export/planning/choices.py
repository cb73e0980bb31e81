"""What a plan assumes of a search before it has chosen: sizes, engines, tokens to judge by."""

from __future__ import annotations

from typing import Final

from prune_export.errors import PlanError
from prune_export.planning.limits import windows_of
from prune_export.recipe import Export, Recipe, Search, engines_of

_HARDLY: Final = 0.9


def left_of(search: Search, nbytes: int) -> float:
    """The fraction of the parameters of a base of `nbytes` that candidates are taken to keep.

    Until an engine is timed, a speed is taken to be in proportion to the parameters.

    Raises:
        PlanError: the base is small enough already, and there is no engine to choose.
    """
    try:
        found = search.target.fraction(nbytes)
    except PlanError:
        if not search.engines:
            raise
        found = _HARDLY  # the base is small enough, and its engines may be larger
    return found or 1 / (search.target.speedup or 1.5)


def tokens_judged(recipe: Recipe, search: Search) -> int:
    """The tokens of the text that a search judges by."""
    source = recipe.data[search.validation]
    return windows_of(source, recipe.root) * source.length


def exported(recipe: Recipe) -> tuple[Export, ...]:
    """What is exported; of engines that a search chooses among, the first."""
    if recipe.export:
        return recipe.export
    searches = [stage.entry for stage in recipe.stages if stage.kind == "search"]
    return tuple(one.export for search in searches[-1:] for one in [*engines_of(search)][:1])
