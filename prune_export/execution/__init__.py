"""Runs a recipe: plans it, makes every artifact, measures, and writes the result directory.

Every step is an artifact of the store, so a run that was killed goes on where it was, and a step
that an earlier run has done is taken from there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint, resolve_model
from prune_export.contracts import HasSparsity, Taught
from prune_export.deriving.cache import ensure_family
from prune_export.errors import StageError
from prune_export.execution.asked import config_of, imported_from, model_of, with_data
from prune_export.execution.choosing import run_choice
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import Base, dense_artifact, open_base
from prune_export.execution.measure import measure_run
from prune_export.execution.proving import quality_in_time
from prune_export.execution.record import report_of
from prune_export.execution.result import Result, alone, lock_of, mend, versions
from prune_export.execution.said import make_data
from prune_export.execution.search import run_search
from prune_export.execution.stages import run_stage
from prune_export.execution.watch import Watch
from prune_export.machine import Machine
from prune_export.planning import (
    CALIBRATION,
    Devices,
    Plan,
    Rates,
    fit_time,
    how_busy,
    make_plan,
    refuse_other_vocabulary,
    sets_of,
)
from prune_export.progress import Progress, Silent
from prune_export.recipe import PUBLISHED_NAME, EngineOption, Export, Recipe, Stage, heal_of
from prune_export.store import Artifact, Store
from prune_export.system.processes import ALONE, Team
from prune_export.system.temporary import sweep
from prune_export.verify import Engine, check_tasks
from prune_export.verify.results import Gate, Verification

__all__ = ["Plan", "RunResult", "make_plan", "plan", "run", "with_data"]


@dataclass(frozen=True)
class RunResult:
    """The result of a run: its directory, its report, and its gates."""

    out: Path
    report: Mapping[str, Any]
    verification: Verification

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates of the recipe that were not met."""
        return tuple(gate for gate in self.verification.gates if not gate.ok)

    def _repr_html_(self) -> str:
        """The summary of the report in a notebook."""
        from prune_export.report import summary_html

        return summary_html(self.report)


@dataclass(frozen=True)
class Options:
    """Settings of a run besides the recipe: places, machine. They change no artifact's bytes.

    With `seconds` the recipe itself is fitted into that time: another recipe, with its own bytes.
    """

    out: Path
    store: Path
    machine: Machine
    ram_limit: int | None = None
    seconds: float | None = None
    force: frozenset[str] = frozenset()
    ignore_keys: tuple[str, ...] = ()
    command: str = ""
    team: Team = ALONE
    devices: Devices | None = None
    """What a plan is for, where it is not for this machine and team."""


def plan(recipe: Recipe, model: str | None, options: Options) -> Plan:
    """Plans a recipe for a model; writes nothing and reads no weight.

    `model` is a Hub id, a directory (a config.json alone will do) or a .gguf file; it replaces the
    recipe's own.

    Raises:
        PlanError: the work cannot succeed, or the model cannot be found.
        CheckpointError: the model is broken or unsafe.
        UnsupportedArch: the architecture tables do not describe the model.
    """
    return _fitted(recipe, model, options)[1]


def _fitted(recipe: Recipe, model: str | None, options: Options) -> tuple[Recipe, Plan]:
    """The recipe that is run, which a limit of time makes smaller, and its plan."""
    if recipe.verify.quality:
        check_tasks(recipe.verify.quality.tasks)
    spec, path, _ = model_of(recipe, model)
    checkpoint = config_of(path)
    if ensure_family(checkpoint, options.store):
        checkpoint = config_of(path)
    devices = options.devices or Devices(options.team.size, options.team.here)
    rates = None if devices.elsewhere else Rates.measure(options.machine)

    def plan_of(one: Recipe) -> Plan:
        return make_plan(
            one,
            checkpoint,
            options.machine,
            model=spec,
            store=options.store,
            out=options.out,
            ram_limit=options.ram_limit,
            ignore_keys=options.ignore_keys,
            imported=imported_from(path),
            devices=devices,
            rates=rates,
        )

    if options.seconds is None:
        return recipe, plan_of(recipe)
    return fit_time(recipe, options.seconds, plan_of, busy=how_busy())


def run(
    recipe: Recipe, model: str | None, options: Options, progress: Progress | None = None
) -> RunResult:
    """Runs a recipe and writes the result to `options.out`.

    A failed gate is not an exception: the result is written, and `RunResult.failed` names it.

    Raises:
        PruneExportError: from planning, before anything is written, or from a stage; then what
            earlier stages finished is kept, and the same call goes on from there.
    """
    progress, began = progress or Silent(), time.monotonic()
    recipe, planned = _fitted(recipe, model, options)
    watch = Watch(planned.stages, options.seconds, began)
    planned.check()
    out = Path(os.path.realpath(options.out))
    mend(out)
    sweep()
    store = Store(options.store)
    store.sweep()
    context = RunContext(
        store, options.machine, progress, options.force, options.ignore_keys, options.command,
        options.team, watch,
    )  # fmt: skip
    if options.seconds is not None:
        progress.say(planned.notes[-1])
    with watch.step("import"):
        base = open_base(context, *model_of(recipe, model))
    with watch.step("ask", label="data"):
        data = _data(context, recipe, base)
    asked = recipe.to_yaml()
    staged = _stages(context, recipe, base, data, options.ignore_keys)
    recipe, stages = staged.recipe, staged.made
    last = stages[-1] if stages else base
    tokens = data[CALIBRATION][1] if CALIBRATION in data else None
    exports = []
    for export in recipe.export:
        with watch.step("export", export.name):
            exports.append(export_engine(context, export, last.path, last.id, tokens=tokens))
    dense = []
    for export in _compared(staged) if recipe.verify.speed else ():
        of = ", dense to compare with"
        with watch.step("export", export.name, dense=True):
            dense.append(export_engine(context, export, base.path, base.id, of=of, tokens=tokens))
    off = [_without_sparsity(context, recipe, export, last) for export in recipe.export]
    sets = {name: tokens for name, (_, tokens) in data.items()}
    with watch.step("verify"):
        shorter, shown = quality_in_time(context, recipe, sets)
        found = measure_run(context, shorter, base, stages, exports, dense, shown, off)
    made = _Made(asked, planned.notes, base, data, staged, exports, found)
    try:
        with alone(out):
            report = _finished(context, recipe, out, made)
    except OSError as error:
        raise StageError(
            str(out),
            f"the result cannot be put there: {error}",
            f"all that was made for it is kept; mend that, and go on with\n  {options.command}",
        ) from error
    return RunResult(options.out, report, found)


def _compared(staged: _Staged) -> list[Export]:
    """The exports of the dense model that a result's are compared with: the same, but for the one
    that a search chose, which is compared with what the search compared with.
    """
    return [
        staged.reference.export
        if staged.chosen and staged.reference and export is staged.chosen.export
        else export
        for export in staged.recipe.export
    ]


def _without_sparsity(
    context: RunContext, recipe: Recipe, export: Export, last: Artifact | Base
) -> Artifact | None:
    """Builds the same engine without sparse kernels, to measure their gain; None where unneeded."""
    entry = export.entry.without_sparsity() if isinstance(export.entry, HasSparsity) else None
    runs = Engine(export.name, last.path).runs_on(context.machine)
    if entry is None or recipe.verify.speed is None or not runs:
        return None
    twin = replace(export, entry=entry)
    return export_engine(context, twin, last.path, last.id, of=", sparsity off")


def _data(context: RunContext, recipe: Recipe, base: Base) -> dict[str, tuple[Artifact, TokenSet]]:
    """Makes the recipe's token sets; those it is judged by share no document with the others."""
    data = {}
    seen: tuple[str, ...] = ()
    for name, judges in sets_of(recipe):
        data[name] = make_data(context, name, recipe.data[name], recipe.root, base, seen)
        if judges:
            seen = (*seen, *data[name][1].documents)
    return data


@dataclass(frozen=True)
class _Staged:
    """A recipe's stages as they were made: searches are replaced by what they chose.

    `chosen` is the engine that a search chose, `reference` the one that it is compared with.
    """

    recipe: Recipe
    made: list[Artifact]
    searches: list[dict[str, Any]]
    chosen: EngineOption | None = None
    reference: EngineOption | None = None


def _stages(
    context: RunContext,
    recipe: Recipe,
    base: Base,
    data: Mapping[str, tuple[Artifact, TokenSet]],
    ignore_keys: tuple[str, ...],
) -> _Staged:
    """Makes all stages; a model that a search left dense is not healed."""
    made: list[Artifact] = []
    carried: list[Stage] = []
    searches: list[dict[str, Any]] = []
    chosen = reference = None
    for stage in recipe.stages:
        if stage.kind == "heal" and chosen is not None and not made:
            context.progress.say(f"heal {stage.name}: left out, as nothing was pruned")
            continue
        source = made[-1] if made else base
        if stage.kind == "search":
            teacher = _teacher(context, recipe, heal_of(stage.entry), base)
            search = run_choice if stage.entry.engines else run_search
            with _watched(context, stage):
                found = search(context, stage, source, data, ignore_keys, teacher)
            made += found.made
            carried += found.stages
            searches.append(found.table)
            chosen, reference = found.engine or chosen, found.reference or reference
            continue
        teacher = _teacher(context, recipe, stage, base) if stage.kind == "heal" else None
        stage = _in_time(context, stage, sum(one.kind == "heal" for one in carried))
        with _watched(context, stage):
            made.append(_made(context, stage, source, data, teacher))
        carried.append(stage)
    if chosen is not None and chosen.quantize is not None:
        made.append(_made(context, chosen.quantize, made[-1] if made else base, data))
        carried.append(chosen.quantize)
    recipe = replace(recipe, stages=tuple(carried))
    if chosen is not None:
        place = type(chosen.export.entry).DIRECTORY
        others = [one for one in recipe.export if place != type(one.entry).DIRECTORY]
        recipe = replace(recipe, export=(chosen.export, *others))
    return _Staged(recipe, made, searches, chosen, reference)


def _watched(context: RunContext, stage: Stage) -> AbstractContextManager[None]:
    name = None if stage.kind == "search" else stage.name
    return context.watch.step(stage.kind, name) if context.watch else nullcontext()


def _in_time(context: RunContext, stage: Stage, before: int) -> Stage:
    """A heal stage with as many steps as there is time for, by what earlier steps have taken.

    `before` are the heals before it: those after it get their part of the time.
    """
    steps = getattr(stage.entry, "steps", None)
    if stage.kind != "heal" or context.watch is None or not isinstance(steps, int):
        return stage
    heals = [one.seconds for one in context.watch.planned if one.kind == "heal"][before:]
    fitting = context.watch.steps_for(steps, sum(heals[:1]), "heal", sum(heals[1:]))
    if fitting >= steps:
        return stage
    context.say_late(f"heal {stage.name}: {fitting} of {steps} steps, as time was short.")
    return replace(stage, entry=replace(stage.entry, steps=fitting))


def _made(
    context: RunContext,
    stage: Stage,
    source: Base | Artifact,
    data: Mapping[str, tuple[Artifact, TokenSet]],
    teacher: Base | None = None,
) -> Artifact:
    return run_stage(context, stage, source.path, source.id, data.get(stage.data), teacher)


def _teacher(context: RunContext, recipe: Recipe, stage: Stage | None, base: Base) -> Base | None:
    """The model that a heal stage learns from: what the recipe starts from, or another."""
    entry = stage.entry if stage else None
    if not isinstance(entry, Taught) or not entry.taught:
        return None
    if entry.teacher is None:
        return base
    path, revision = resolve_model(entry.teacher, below=recipe.root, asker=recipe.name)
    other = open_base(context, entry.teacher, path, revision)
    models = Checkpoint.open(other.path), Checkpoint.open(base.path)
    refuse_other_vocabulary(*models, context.ignore_keys)
    return other


@dataclass(frozen=True)
class _Made:
    """Everything that a run made; `asked` is the recipe as it was written."""

    asked: str
    notes: Sequence[str]
    base: Base
    data: Mapping[str, tuple[Artifact, TokenSet]]
    staged: _Staged
    exports: list[Artifact]
    found: Verification


def _finished(context: RunContext, recipe: Recipe, out: Path, made: _Made) -> dict[str, Any]:
    # Imported here: it brings matplotlib, which a plan has no use for.
    from prune_export.report import write_report

    base, data, stages, exports = made.base, made.data, made.staged.made, made.exports
    report = report_of(context, recipe, base, data, stages, exports, made.found)
    report["recipe"]["text"] = made.asked
    report["searches"] = made.staged.searches
    report["notes"] = list(made.notes)
    if context.watch is not None:
        report["notes"] += context.watch.notes
        report["estimates"] = context.watch.steps
    if made.staged.reference is not None:
        report["reference"] = made.staged.reference.label
    result = Result(out)
    named: dict[str, Artifact] = {}
    for stage, artifact in zip(recipe.stages, stages, strict=True):
        named[f"stages.{len(named)}.{stage.kind}"] = artifact
    if stages:
        result.add(stages[-1])
    elif made.staged.chosen is not None:
        named["dense"] = dense_artifact(context, base)
        result.add(named["dense"])
    for export, artifact in zip(recipe.export, exports, strict=True):
        named[f"export.{export.name}"] = artifact
        result.add(artifact, type(export.entry).DIRECTORY)
    result.write_text(PUBLISHED_NAME, made.asked)
    used = {
        name: {"id": artifact.id, "fingerprint": set_.fingerprint}
        for name, (artifact, set_) in sorted(data.items())
    }
    origin = {"model": base.name, "revision": base.revision, "id": base.id}
    digest = hashlib.sha256(made.asked.encode()).hexdigest()
    result.write_json("verify.json", made.found.to_json())
    result.write_json("report.json", report)
    write_report(report, result.partial)
    result.write_lists(lock_of(origin, used, named, digest, versions()))
    every = [*named.values(), *(artifact for artifact, _ in data.values())]
    said = [one.record["answers"] for one in every if "answers" in one.record]
    context.store.remember(out, [artifact.id for artifact in every] + said + [base.id])
    result.finish()
    return report
