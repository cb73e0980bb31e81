"""What a recipe would fetch or send when it is run, told before it does."""

from __future__ import annotations

import os

from prune_export.recipe import Generated, HubDataset, Recipe, Stage, heal_of


def fetches(recipe: Recipe, model: str | None = None, *, own_data: bool = False) -> list[str]:
    """Lists what a run would fetch from elsewhere, and to whom it would send: a line for each.

    `model` and `own_data` say what the caller gives in place of the recipe's own.
    """
    found = [f"recipe {address}" for address in recipe.fetched]
    named = [_teacher(stage) for stage in recipe.stages]
    if model is None:
        named.insert(0, recipe.model)
    elif not os.path.exists(os.path.expanduser(model)):
        found.append(f"model {model}")
    found += [f"model {name}" for name in named if name and not (recipe.root / name).exists()]
    for source in () if own_data else recipe.data.values():
        if isinstance(source, HubDataset):
            detail = f" {source.config}" if source.config else ""
            at = f"@{source.revision}" if source.revision else ""
            found.append(f"dataset {source.dataset}{at}{detail}")
        if isinstance(source, Generated) and source.generated.is_server:
            found.append(f"answers of {source.generated.speaker}, which is sent the prompts")
    tasks = recipe.verify.quality.tasks if recipe.verify.quality else ()
    found += [f"the data of the task {name}" for name in tasks]
    return list(dict.fromkeys(found))


def _teacher(stage: Stage) -> str | None:
    healer = heal_of(stage.entry) if stage.kind == "search" else stage
    found = getattr(healer.entry, "teacher", None) if healer else None
    return found if isinstance(found, str) else None
