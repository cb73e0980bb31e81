"""Fits a recipe into a time: fewer and shorter samples, candidates, rungs and steps.

A recipe is made smaller level by level, each about half the work of the one before, until its plan
fits; what time is left then goes to the healing, which is where it helps most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from prune_export.errors import PlanError
from prune_export.planning.planned import Plan
from prune_export.recipe import Recipe, Search, Source, Stage
from prune_export.units import text_from_seconds

_LEVELS: Final = 12
_ROOM: Final = 0.85
"""The part of the time that is planned with: plans are estimates."""

_LENGTHS: Final = {0: None, 1: None, 2: 1024, 3: 1024, 4: 512, 5: 512}
_ENGINES: Final = 4
"""Engines that stay: models refuse some, and the run leaves out what it has no time for."""

_TOO_SHORT_TO_TIME: Final = 6
"""The level from which on candidates are timed only where the target is a speed."""

_SHORTEST: Final = 256
_FEWEST: Final = 16
_LEAST_STEPS: Final = 4
_MORE: Final = 4
"""How many times the time is looked at, to say what it would buy."""


def fit_time(
    recipe: Recipe, seconds: float, plan_of: Callable[[Recipe], Plan], *, busy: float = 1.0
) -> tuple[Recipe, Plan]:
    """Gives the largest version of a recipe whose plan fits into `seconds`, and that plan.

    The plan's notes say what was scaled down, and what more time would buy. Plans are of a machine
    at rest; where others use this one, work takes `busy` times as long now, and may not later, so
    that alone refuses nothing.

    Raises:
        PlanError: even the smallest does not fit.
    """
    whole = plan_of(recipe)
    shared = f" This machine is busy: work takes {busy:.1f} times as long." if busy > 1.2 else ""
    if whole.seconds * busy <= seconds * _ROOM:
        note = f"All of it fits into {text_from_seconds(seconds)}.{shared}"
        return recipe, replace(whole, notes=(*whole.notes, note))
    fitted, planned = _largest(recipe, seconds, plan_of, busy)
    less = ", ".join(_differences(recipe, fitted))
    note = (
        f"To fit into {text_from_seconds(seconds)} instead of {text_from_seconds(whole.seconds)}: "
        f"{less}.{shared}"
    )
    better, _ = _largest(recipe, _MORE * seconds, plan_of, busy)
    more = ", ".join(_differences(fitted, better))
    if more:
        note += f" With {text_from_seconds(_MORE * seconds)} it would be: {more}."
    return fitted, replace(planned, notes=(*planned.notes, note))


def _largest(
    recipe: Recipe, seconds: float, plan_of: Callable[[Recipe], Plan], busy: float
) -> tuple[Recipe, Plan]:
    low, high = 0, _LEVELS
    found = scaled(recipe, high)
    plan = plan_of(found)
    if plan.seconds > seconds:
        raise PlanError(
            f"{recipe.name}  --time",
            f"got {text_from_seconds(seconds)}, and the least that this recipe can do takes about "
            f"{text_from_seconds(plan.seconds)}",
            f"allow {text_from_seconds(1.2 * plan.seconds)}, or name fewer candidates and engines",
        )
    while low < high:
        middle = (low + high) // 2
        tried = scaled(recipe, middle)
        its = plan_of(tried)
        if its.seconds * busy <= seconds * _ROOM:
            found, plan, high = tried, its, middle
        else:
            low = middle + 1
    spare = seconds * _ROOM / busy - plan.seconds
    longer = _healed_longer(recipe, found, plan, spare)
    return (longer, plan_of(longer)) if longer is not found else (found, plan)


def scaled(recipe: Recipe, level: int) -> Recipe:
    """A recipe of about 2^-level of the work: samples, lengths, candidates, rungs and steps."""
    if level == 0:
        return recipe
    factor = 0.5**level
    stages = tuple(map(partial(_scaled_stage, level=level), recipe.stages))
    trained = {stage.data for stage in recipe.stages if stage.kind == "heal"}
    data = {
        name: _scaled_source(source, level, fewer=name not in trained)
        for name, source in recipe.data.items()
    }
    verify = recipe.verify
    if verify.speed is not None:
        minutes = min(verify.speed.minutes, max(0.5, 4 * verify.speed.minutes * factor))
        speed = verify.speed.model_copy(update={"minutes": minutes})
        verify = verify.model_copy(update={"speed": speed})
    return replace(recipe, stages=stages, data=data, verify=verify)


def _scaled_stage(stage: Stage, level: int) -> Stage:
    if stage.kind == "search":
        return replace(stage, entry=_scaled_search(stage.entry, level))
    if stage.kind != "heal" or not isinstance(getattr(stage.entry, "steps", None), int):
        return stage
    found = _scaled_heal({"steps": stage.entry.steps, "batch": stage.entry.batch}, level)
    return replace(stage, entry=replace(stage.entry, **found))


def _scaled_search(search: Search, level: int) -> Search:
    keep = max(1, len(search.candidates) - level)
    return replace(
        search,
        candidates=search.candidates[:keep],
        heal=_scaled_heal(dict(search.heal), level) if search.heal else None,
        rungs=max(1, search.rungs - level // 3),
        engines=search.engines[: max(_ENGINES, len(search.engines) - level // 2)],
        measure_speed=search.measure_speed and level < _TOO_SHORT_TO_TIME,
    )


def _scaled_heal(body: dict[str, Any], level: int) -> dict[str, Any]:
    """Fewer steps, and smaller ones: a step of 16 windows is a luxury where there are few."""
    halves = min(level, 3)
    found = dict(body)
    if isinstance(found.get("batch"), int):
        found["batch"] = max(2, found["batch"] >> halves)
    if isinstance(found.get("steps"), int):
        found["steps"] = max(_LEAST_STEPS, found["steps"] >> max(level - halves, 0))
    return found


def _scaled_source(source: Source, level: int, *, fewer: bool) -> Source:
    """Shorter windows, and if `fewer` not so many; what is trained on costs nothing until it is."""
    most = _LENGTHS.get(level, _SHORTEST)
    length = min(source.length, most or source.length)
    samples = source.samples
    if samples is not None and fewer:
        samples = min(samples, max(_FEWEST, samples >> (level // 2)))
    return source.model_copy(update={"samples": samples, "length": length})


def _healed_longer(whole: Recipe, found: Recipe, plan: Plan, spare: float) -> Recipe:
    """Gives the last heal as many more steps as there is time for, up to what was asked."""
    heals = [place for place, stage in enumerate(found.stages) if stage.kind == "heal"]
    planned = [one for one in plan.stages if one.kind == "heal"]
    if not heals or not planned or spare <= 0:
        return found
    stage, asked = found.stages[heals[-1]], whole.stages[heals[-1]]
    steps = getattr(stage.entry, "steps", None)
    if not isinstance(steps, int) or planned[-1].seconds <= 0:
        return found
    more = min(asked.entry.steps, int(steps * (1 + spare / planned[-1].seconds)))
    if more <= steps:
        return found
    longer = replace(stage, entry=replace(stage.entry, steps=more))
    stages = (*found.stages[: heals[-1]], longer, *found.stages[heals[-1] + 1 :])
    return replace(found, stages=stages)


def _differences(one: Recipe, other: Recipe) -> list[str]:
    """What differs between two versions of a recipe, in words: `healing 2000 → 60 steps`."""
    found = []
    for name, source in one.data.items():
        after = other.data[name]
        before_text = f"{source.samples or 'all'} x {source.length}"
        after_text = f"{after.samples or 'all'} x {after.length}"
        if before_text != after_text:
            found.append(f"{name} {before_text} → {after_text} tokens")
    for stage, after_stage in zip(one.stages, other.stages, strict=True):
        before, now = stage.entry, after_stage.entry
        if stage.kind == "search":
            for what, size in (("candidates", len), ("engines", len)):
                was, is_ = size(getattr(before, what)), size(getattr(now, what))
                found += [f"{was} → {is_} {what}"] if was != is_ else []
            if before.measure_speed and not now.measure_speed:
                found.append("no candidate timed")
            short = [dict(at.heal or {}).get("steps") for at in (before, now)]
            if short[0] != short[1]:
                found.append(f"short heals {short[0]} → {short[1]} steps")
        elif stage.kind == "heal" and getattr(before, "steps", None) != getattr(now, "steps", None):
            found.append(f"healing {before.steps} → {now.steps} steps")
    return found
