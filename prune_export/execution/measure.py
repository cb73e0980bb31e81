"""Makes the measurements that a recipe's `verify` asks for, each through the store.

Quality depends on the files alone. Speed is about a machine, so that is part of its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from prune_export import recipe as recipes
from prune_export.calibrate import TokenSet
from prune_export.contracts import BuildRecord, Work
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base
from prune_export.execution.optional import OutOfTime, optional
from prune_export.execution.proving import speed_in_time, time_to_generate, time_to_time
from prune_export.machine import describe
from prune_export.recipe import Quality, Recipe
from prune_export.store import Artifact, Key
from prune_export.verify import (
    Effort,
    Engine,
    measure_engine_tasks,
    measure_generation,
    measure_parity,
    measure_perplexity,
    measure_placement,
    measure_reload,
    measure_sparsity,
    measure_speed,
    measure_tasks,
    not_from_rounding,
    perplexity_gates,
    placement_gates,
    speed_gates,
    tokens_without_text,
)
from prune_export.verify.results import (
    Generation,
    Parity,
    Perplexity,
    Placed,
    Reload,
    Sparsity,
    Speed,
    Task,
    Verification,
    from_json,
    to_json,
)

T = TypeVar("T")
_VERSION: Final = "2"
_GENERATION_VERSION: Final = "3"


@dataclass(frozen=True)
class Point:
    """A model to measure, by the name that the report gives it."""

    name: str
    path: Path
    id: str


def measure_run(
    context: RunContext,
    recipe: Recipe,
    base: Base,
    stages: Sequence[Artifact],
    exports: Sequence[Artifact],
    dense: Sequence[Artifact],
    data: Mapping[str, TokenSet],
    off: Sequence[Artifact | None] = (),
) -> Verification:
    """Measures everything that the recipe's `verify` asks for.

    `off` has for each export the same engine with sparsity off, where that makes a difference.
    Parity and speed feed evaluation tokens, or those of another source where there are none.
    """
    asked = recipe.verify
    points = _points(recipe, base, stages)
    engines = [(artifact, _engine(artifact)) for artifact in exports]
    runnable = [(artifact, one) for artifact, one in engines if one.runs_on(context.machine)]
    quality = asked.quality
    text = data.get(quality.perplexity) if quality and quality.perplexity else None
    ids = _any_ids(text, data)
    found = Verification(reload=_reload(context, points[-1]), machine=describe())
    if asked.parity or asked.speed or (quality and quality.engines):
        found.unverified.update(
            {one.exporter: why for _, one in engines if (why := one.why_not(context.machine))}
        )  # fmt: skip
    if text is not None and quality is not None:
        for point in points:
            found.perplexity.append(
                _perplexity(context, point.name, Engine.pytorch(point.path), point.id, text)
            )
        for artifact, engine in runnable:
            if quality.engines:
                found.perplexity.append(
                    _perplexity(context, engine.exporter, engine, artifact.id, text)
                )
    measured = 1 + len(found.perplexity)
    if asked.generation and time_to_generate(context, recipe, measured, len(points)):
        short = optional(context, lambda: context.pace.left < time_to_time(context, recipe))
        try:
            found.generation.extend([_generation(short, point) for point in points])
        except OutOfTime:
            context.say_late("verify: generated text was given up, as time was short.")
    if quality and quality.tasks:
        found.tasks.extend(_tasks(context, quality, points))
        for artifact, engine in runnable if quality.engines else ():
            found.tasks.extend(_engine_tasks(context, quality, found.tasks, artifact, engine))
    for artifact, engine in runnable:
        if asked.parity:
            found.parity.append(_parity(context, artifact, engine, points[-1], ids))
        found.placement.extend(_placement(context, artifact, engine))
    if asked.speed:
        speed = speed_in_time(context, asked.speed, len(exports))
        for one, other in zip(dense, exports, strict=True):
            if not _engine(other).runs_on(context.machine):
                continue
            found.speed.extend(_speed(context, speed, one, other, ids))
            found.sweep.extend(_sweep(context, speed, one, other, ids))
        found.gates.extend(speed_gates(found.speed, asked.speed.at_least, asked.speed.phase))
    found.gates.extend(placement_gates(found.placement))
    twins = off or [None] * len(exports)
    for artifact, twin in zip(exports, twins, strict=True):
        sparse = _sparsity(context, asked.speed, artifact, twin, ids)
        made = any("mask_digest" in stage.record["log"] for stage in stages)
        record = BuildRecord.from_json(artifact.record)
        found.sparsity.extend(not_from_rounding(sparse, record, zeros_made=made))
    if quality:
        found.gates.extend(perplexity_gates(found.perplexity, points[-1].name, quality.at_most))
    return found


def _points(recipe: Recipe, base: Base, stages: Sequence[Artifact]) -> list[Point]:
    """The models to measure: the dense one, the last one before healing, and the result."""
    points = [Point("dense", base.path, base.id)]
    kinds = [stage.kind for stage in recipe.stages]
    if "heal" in kinds:
        heals = [place for place, kind in enumerate(kinds) if kind == "heal"]
        # Of rounds the last: the model before that has the shapes of the result.
        before = heals[-1 if recipe.stages[heals[0]].round else 0] - 1
        if before >= 0:
            points.append(Point("pruned", stages[before].path, stages[before].id))
        points.append(Point("healed", stages[-1].path, stages[-1].id))
    elif stages:
        points.append(Point("pruned", stages[-1].path, stages[-1].id))
    return points


def _engine(artifact: Artifact) -> Engine:
    record = BuildRecord.from_json(artifact.record)
    return Engine.of(record, artifact.path, trusted=True)  # this store made it


def _any_ids(text: TokenSet | None, data: Mapping[str, TokenSet]) -> np.ndarray:
    chosen = text or next(iter(data.values()), None)
    if chosen is not None:
        return np.asarray(chosen.ids.numpy())
    return tokens_without_text()


def _kept(
    context: RunContext,
    name: str,
    label: str,
    kind: Any,
    inputs: tuple[str, ...],
    parameters: Mapping[str, Any],
    measure: Callable[[], T],
    version: str = _VERSION,
) -> T:
    """Takes a measurement from the store, or makes it by `measure`."""
    key = Key("verify", name, version, parameters, inputs)

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        del files, work
        return {"result": to_json(measure())}

    found: T = from_json(kind, context.make(key, label, build).record["result"])
    return found


def _reload(context: RunContext, point: Point) -> Reload:
    return _kept(
        context, "reload", "verify: reload in a fresh process", Reload, (point.id,), {},
        lambda: measure_reload(point.path, context.machine, progress=context.progress),
    )  # fmt: skip


def _perplexity(
    context: RunContext, name: str, engine: Engine, id_: str, text: TokenSet
) -> Perplexity:
    return _kept(
        context, "perplexity", f"verify: perplexity of {name}", Perplexity,
        (id_, text.fingerprint), {"name": name},
        lambda: measure_perplexity(name, engine, text, context.machine, progress=context.progress),
    )  # fmt: skip


def perplexity_of(context: RunContext, name: str, artifact: Artifact, text: TokenSet) -> float:
    """Measures the perplexity of a search's candidate."""
    return _perplexity(context, name, Engine.pytorch(artifact.path), artifact.id, text).value


def engine_perplexity(context: RunContext, name: str, engine: Artifact, text: TokenSet) -> float:
    """Measures the perplexity of an engine of a search's point, on the engine itself."""
    return _perplexity(context, name, _engine(engine), engine.id, text).value


def engine_speed(
    context: RunContext, dense: Artifact, engine: Artifact, workload: recipes.Workload
) -> float:
    """Measures the median decode speedup of `engine` over `dense`."""
    asked = recipes.Speed(workloads=(workload,), minutes=0.75)
    found = _speed(context, asked, dense, engine, tokens_without_text())
    return next(one.ratio for one in found if one.phase == "decode")


def dense_latency_ms(context: RunContext, dense: Artifact, workload: recipes.Workload) -> float:
    """Measures the median time of an engine's decode step in milliseconds."""
    asked = recipes.Speed(workloads=(workload,), minutes=0.75)
    found = _speed(context, asked, dense, dense, tokens_without_text())
    steps = next(one.dense_seconds for one in found if one.phase == "decode")
    return 1000 * float(np.median(steps))


def _generation(context: RunContext, point: Point) -> Generation:
    return _kept(
        context, "generation", f"verify: generation of {point.name}", Generation,
        (point.id,), {"name": point.name},
        lambda: measure_generation(
            point.name, Engine.pytorch(point.path), point.path, context.machine,
            progress=context.progress,
        ),
        version=_GENERATION_VERSION,
    )  # fmt: skip


def _tasks(context: RunContext, quality: Quality, points: Sequence[Point]) -> list[Task]:
    return _kept(
        context, "tasks", "verify: lm-eval tasks", list[Task], (points[0].id, points[-1].id),
        {"tasks": list(quality.tasks), "samples": quality.task_samples},
        lambda: measure_tasks(
            quality.tasks, points[-1].path, context.machine, dense=points[0].path,
            samples=quality.task_samples, progress=context.progress,
        ),
    )  # fmt: skip


def _engine_tasks(
    context: RunContext,
    quality: Quality,
    beside: Sequence[Task],
    artifact: Artifact,
    engine: Engine,
) -> list[Task]:
    own = [one for one in beside if not one.engine]
    return _kept(
        context, "engine_tasks", f"verify: lm-eval tasks on {engine.exporter}", list[Task],
        (artifact.id,), {
            "tasks": list(quality.tasks), "samples": quality.task_samples,
            "dense": [[one.name, one.metric, one.dense] for one in own],
        },
        lambda: measure_engine_tasks(
            quality.tasks, engine, context.machine, beside=own, samples=quality.task_samples,
            progress=context.progress,
        ),
    )  # fmt: skip


def _parity(
    context: RunContext, artifact: Artifact, engine: Engine, point: Point, ids: np.ndarray
) -> Parity:
    return _kept(
        context, "parity", f"verify: {engine.exporter} against PyTorch", Parity,
        (artifact.id, point.id), {"tokens": _digest(ids)},
        lambda: measure_parity(
            engine, Engine.pytorch(point.path), ids, context.machine, progress=context.progress
        ),
    )  # fmt: skip


def _placement(context: RunContext, artifact: Artifact, engine: Engine) -> list[Placed]:
    about = {"machine": describe(), "device": context.machine.device}
    return _kept(
        context, "placement", f"verify: nodes of {engine.exporter}", list[Placed], (artifact.id,),
        about, lambda: measure_placement(engine, context.machine, progress=context.progress),
    )  # fmt: skip


def _sparsity(
    context: RunContext,
    asked: recipes.Speed | None,
    artifact: Artifact,
    off: Artifact | None,
    ids: np.ndarray,
) -> list[Sparsity]:
    """Checks an engine's sparse kernels; measures the gain over the engine without, if asked."""
    record = BuildRecord.from_json(artifact.record)
    name = record.exporter
    found = _kept(
        context, "sparsity", f"verify: sparse weights of {name}", list[Sparsity], (artifact.id,),
        {}, lambda: measure_sparsity(record, artifact.path),
    )  # fmt: skip
    if not asked or off is None:
        return found
    gain = _speed(context, asked, off, artifact, ids, than="itself with sparsity off")
    sweep = _sweep(context, asked, off, artifact, ids, than="itself with sparsity off")
    return [replace(one, gain=gain, sweep=sweep) for one in found]


def _speed(
    context: RunContext,
    asked: recipes.Speed,
    dense: Artifact,
    pruned: Artifact,
    ids: np.ndarray,
    *,
    than: str = "dense",
) -> list[Speed]:
    effort = Effort(seconds=asked.minutes * 60)
    return _timed(context, asked.workloads, effort, dense, pruned, ids, than)


def _sweep(
    context: RunContext,
    asked: recipes.Speed,
    dense: Artifact,
    pruned: Artifact,
    ids: np.ndarray,
    *,
    than: str = "dense",
) -> list[Speed]:
    """Measures speed over a grid of workloads, where one is asked for, with fewer samples each."""
    if asked.sweep is None:
        return []
    effort = Effort(launches=3, rounds=2, most_launches=3, seconds=asked.sweep.minutes * 60)
    grid = asked.sweep.workloads
    return _timed(context, grid, effort, dense, pruned, ids, f"{than} over a grid")


def _timed(
    context: RunContext,
    asked: Sequence[recipes.Workload],
    effort: Effort,
    dense: Artifact,
    pruned: Artifact,
    ids: np.ndarray,
    than: str,
) -> list[Speed]:
    workloads = list(asked)
    one, other = _engine(dense), _engine(pruned)
    about = {"workloads": to_json(workloads), "minutes": effort.seconds / 60,
             "machine": describe(), "threads": context.machine.threads,
             "device": context.machine.device}  # fmt: skip
    return _kept(
        context, "speed", f"verify: speed of {other.exporter} against {than}", list[Speed],
        (dense.id, pruned.id), about,
        lambda: measure_speed(
            one, other, workloads, ids, context.machine, effort=effort, progress=context.progress
        ),
    )  # fmt: skip


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids[:4]).tobytes()).hexdigest()
