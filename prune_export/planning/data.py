"""Lists the data that a recipe reads, and refuses data that are too short."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from prune_export.calibrate import (
    Tokenizer,
    Wanted,
    is_plenty,
    refuse_short,
    refuse_unreadable,
)
from prune_export.contracts import HEALING_WINDOWS
from prune_export.errors import CheckpointError, PlanError
from prune_export.recipe import LocalText, Recipe, Source, Stage, TokenFile, heal_of

CALIBRATION: Final = "calibration"
"""The data that exporters calibrate with, where a recipe names a source so."""


def sets_of(recipe: Recipe) -> tuple[tuple[str, bool], ...]:
    """Lists a recipe's data sets in the order in which they are made, and which of them evaluate.

    What judges comes first: no set may share a document with those that judge before it.
    """
    used = {name for stage in recipe.stages for name in stage.uses if name in recipe.data}
    if any(export.calibrates for export in recipe.export):
        used |= {CALIBRATION} & recipe.data.keys()
    ranking = {stage.data for stage in recipe.stages if stage.kind == "search"}
    quality = recipe.verify.quality
    evaluation = {quality.perplexity} if quality and quality.perplexity else set()
    judges = (*evaluation, *sorted(ranking - evaluation))
    others = sorted(used - ranking - evaluation)
    return (*((name, True) for name in judges), *((name, False) for name in others))


def source_of(recipe: Recipe, stage: Stage) -> Source:
    """The data source that a stage names.

    Raises:
        PlanError: the recipe does not define it.
    """
    if stage.data not in recipe.data:
        raise PlanError(
            "data",
            f"the recipe defines no `{stage.data}`, which {stage.name} needs",
            f"add `data: {{{stage.data}: {{files: [...]}}}}`",
        )
    return recipe.data[stage.data]


def refuse_too_little(recipe: Recipe, model: Path, vocabulary: int) -> None:
    """Refuses data with fewer windows than a recipe asks for, or with unknown tokens.

    Known of saved tokens, and of local text where the tokenizer lies in the directory `model`,
    whose embedding has `vocabulary` rows. Of other local text the beginning is looked at. The Hub's
    data are not, nor is more text read than takes a few seconds.

    Raises:
        PlanError: some are too short, cannot be read or are no text, or hold a token that the model
            does not know.
    """
    heals = _healing(recipe)
    for name in sorted(heals):
        if recipe.data[name].samples == 1:
            raise PlanError(
                f"{recipe.name}  data.{name}.samples",
                "is 1, and healing needs one window to train on and one to measure with",
                f"write `samples: {HEALING_WINDOWS}` or more",
            )
    there = Tokenizer.lies_in(model)
    if there and _plenty(recipe, model, vocabulary, heals):
        return
    seen: frozenset[str] = frozenset()
    for name, judges in sets_of(recipe):
        source = recipe.data[name]
        if not isinstance(source, TokenFile | LocalText):
            continue  # the Hub's are not looked at, and what a model says is planned as a step
        try:
            if not (there or isinstance(source, TokenFile)):
                refuse_unreadable(source, recipe.root)
                continue
            found = refuse_short(
                source,
                model,
                recipe.root,
                exclude=seen,
                documents=judges,
                least=HEALING_WINDOWS if name in heals else 1,
                vocabulary=vocabulary,
            )
        except PlanError as error:
            where = f"{recipe.name}  data.{name}"
            raise type(error)(where, f"{error.where}: {error.problem}", error.fix) from None
        seen |= found if judges else frozenset()


def _plenty(recipe: Recipe, model: Path, vocabulary: int, heals: frozenset[str]) -> bool:
    """Whether a count of characters shows that all data suffice; False where it does not."""
    wanted = []
    for name, judges in sets_of(recipe):
        source = recipe.data[name]
        if isinstance(source, TokenFile):
            return False
        if isinstance(source, LocalText):
            least = HEALING_WINDOWS if name in heals else 1
            wanted.append(Wanted(source, source.samples or least, judges))
    try:
        return is_plenty(wanted, model, recipe.root, vocabulary)
    except (PlanError, CheckpointError):
        return False  # the careful look words it


def _healing(recipe: Recipe) -> frozenset[str]:
    """The data sets that healing trains on, those of searches included."""
    stages = [heal_of(one.entry) if one.kind == "search" else one for one in recipe.stages]
    found = {one.data for one in stages if one is not None and one.kind == "heal"}
    return frozenset(found & recipe.data.keys())
