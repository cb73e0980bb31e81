"""Fits verification into what is left of a run's time: less of it, but always a proof.

First go grids of speeds, generated text and tasks, then windows of text, then samples of speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from prune_export.calibrate import TokenSet
from prune_export.execution.context import RunContext
from prune_export.recipe import Recipe, Speed

_LEAST_TIMED_S: Final = 30.0
"""What the fewest launches take that make an interval, on a machine at rest."""

_STARTS_S: Final = 20.0
"""The part of measuring quality that does not depend on the text: processes that start."""

_FEWEST: Final = 4
"""Windows of text below which a perplexity says nothing."""


def quality_in_time(
    context: RunContext, recipe: Recipe, data: Mapping[str, TokenSet]
) -> tuple[Recipe, Mapping[str, TokenSet]]:
    """The recipe and token sets to verify by, with less to do where time is short."""
    pace, verify = context.pace, recipe.verify
    asked = {one.name: pace.ratio * one.seconds for one in pace.planned if one.kind == "verify"}
    quality, speed = asked.get("quality", 0.0), asked.get("speed", 0.0)
    left = pace.left - _report(context)
    if left >= quality + speed:
        return recipe, data
    least = _least_timed(context, recipe)
    text = verify.quality.perplexity if verify.quality else None
    gone = ["generated text"] if verify.generation else []
    if verify.quality and verify.quality.tasks:
        gone.append("tasks")
        verify = verify.model_copy(
            update={"quality": verify.quality.model_copy(update={"tasks": ()})}
        )
    if verify.speed and verify.speed.sweep:
        gone.append("the grid of speeds")
        verify = verify.model_copy(
            update={"speed": verify.speed.model_copy(update={"sweep": None})}
        )
    if gone:
        context.say_late(f"verify: {', '.join(gone)} left out, as time was short.")
    recipe = replace(recipe, verify=verify.model_copy(update={"generation": False}))
    starts = pace.ratio * _STARTS_S
    room = max(left - least, 0.3 * left) - starts
    if text is not None and text in data and quality - starts > room:
        whole = data[text]
        keep = max(_FEWEST, int(whole.samples * max(room, 0.0) / (quality - starts)))
        if keep < whole.samples:
            data = {**data, text: first_windows(whole, keep)}
            context.say_late(
                f"verify: {keep} of {whole.samples} windows of `{text}`, as time was short."
            )
    return recipe, data


def time_to_generate(context: RunContext, recipe: Recipe, measured: int, models: int) -> bool:
    """Whether there is time for generated text of `models`, which is left out first.

    It is taken to last as long for a model as each of the `measured` things of this step did.
    """
    pace = context.pace
    if pace.budget is None:
        return True
    needed = models * pace.elapsed / max(measured, 1)
    if pace.left - needed >= time_to_time(context, recipe):
        return True
    context.say_late("verify: generated text left out, as time was short.")
    return False


def speed_in_time(context: RunContext, asked: Speed, pairs: int) -> Speed:
    """How long engines are timed: what is left, at most what was asked, at least a little."""
    minutes = (context.pace.left - _report(context)) / 60 / max(1, pairs * len(asked.workloads))
    minutes = max(0.5, minutes)
    if minutes >= asked.minutes:
        return asked
    context.say_late(f"verify: engines timed for {minutes:.1f} minutes, as time was short.")
    return asked.model_copy(update={"minutes": minutes})


def first_windows(tokens: TokenSet, count: int) -> TokenSet:
    """The first windows of a set, as a set of its own."""
    counted = None if tokens.counted is None else tokens.counted[:count]
    known = {**tokens.provenance, "windows": count}
    return TokenSet.of(tokens.ids[:count], tokens.documents, known, counted)


def time_to_time(context: RunContext, recipe: Recipe) -> float:
    """Seconds that the least measurement of speed, and the report, are likely to take."""
    return _least_timed(context, recipe) + _report(context)


def _least_timed(context: RunContext, recipe: Recipe) -> float:
    timed = len(recipe.export) if recipe.verify.speed else 0
    return context.pace.ratio * _LEAST_TIMED_S * timed


def _report(context: RunContext) -> float:
    """Seconds that writing the report is likely to take."""
    pace = context.pace
    return pace.ratio * sum(one.seconds for one in pace.planned if one.kind == "report")
