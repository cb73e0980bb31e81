"""Runs a recipe: plans it, makes every artifact, measures, and writes the result directory.

Every step is an artifact of the store, so a run that was killed goes on where it was, and a step
that an earlier run has done is taken from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint, gguf_config, resolve_model
from prune_export.contracts import HasSparsity, Taught
from prune_export.errors import PlanError, StageError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import Base, open_base
from prune_export.execution.measure import measure_run
from prune_export.execution.record import report_of
from prune_export.execution.result import Result, alone, lock_of, mend, versions
from prune_export.execution.said import make_data
from prune_export.execution.search import run_search
from prune_export.execution.stages import run_stage
from prune_export.machine import Machine
from prune_export.planning import (
    CALIBRATION,
    Devices,
    Plan,
    make_plan,
    refuse_other_vocabulary,
    sets_of,
)
from prune_export.progress import Progress, Silent
from prune_export.recipe import PUBLISHED_NAME, Export, Recipe, Stage, heal_of
from prune_export.store import Artifact, Store
from prune_export.system.processes import ALONE, Team
from prune_export.system.temporary import sweep
from prune_export.verify import Engine, check_tasks
from prune_export.verify.results import Gate, Verification

__all__ = ["Plan", "RunResult", "make_plan", "plan", "run"]


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
    """Settings of a run besides the recipe: places, machine. They change no artifact's bytes."""

    out: Path
    store: Path
    machine: Machine
    ram_limit: int | None = None
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
    if recipe.verify.quality:
        check_tasks(recipe.verify.quality.tasks)
    spec, path, _ = _model(recipe, model)
    if path.suffix == ".gguf":
        checkpoint = Checkpoint(path, gguf_config(path), {})
    else:
        weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
        checkpoint = Checkpoint.open(path, weights=weights)
    return make_plan(
        recipe,
        checkpoint,
        options.machine,
        model=spec,
        store=options.store,
        out=options.out,
        ram_limit=options.ram_limit,
        ignore_keys=options.ignore_keys,
        imported=path.suffix == ".gguf",
        devices=options.devices or Devices(options.team.size, options.team.here),
    )


def run(
    recipe: Recipe, model: str | None, options: Options, progress: Progress | None = None
) -> RunResult:
    """Runs a recipe and writes the result to `options.out`.

    A failed gate is not an exception: the result is written, and `RunResult.failed` names it.

    Raises:
        PruneExportError: from planning, before anything is written, or from a stage; then what
            earlier stages finished is kept, and the same call goes on from there.
    """
    progress = progress or Silent()
    plan(recipe, model, options).check()
    out = Path(os.path.realpath(options.out))
    mend(out)
    sweep()
    store = Store(options.store)
    store.sweep()
    context = RunContext(
        store,
        options.machine,
        progress,
        options.force,
        options.ignore_keys,
        options.command,
        options.team,
    )
    base = open_base(context, *_model(recipe, model))
    data = _data(context, recipe, base)
    asked = recipe.to_yaml()
    recipe, stages, searches = _stages(context, recipe, base, data, options.ignore_keys)
    last = stages[-1] if stages else base
    tokens = data[CALIBRATION][1] if CALIBRATION in data else None
    exports = [
        export_engine(context, export, last.path, last.id, tokens=tokens)
        for export in recipe.export
    ]
    dense = []
    if recipe.verify.speed:
        dense = [
            export_engine(
                context, export, base.path, base.id, of=", dense to compare with", tokens=tokens
            )
            for export in recipe.export
        ]
    off = [_without_sparsity(context, recipe, export, last) for export in recipe.export]
    sets = {name: tokens for name, (_, tokens) in data.items()}
    found = measure_run(context, recipe, base, stages, exports, dense, sets, off)
    made = _Made(asked, base, data, stages, searches, exports, found)
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


def _model(recipe: Recipe, model: str | None) -> tuple[str, Path, str | None]:
    """Resolves the model: its name, its path, its commit on the Hub.

    What the caller names may lie anywhere.

    What the recipe names is below its data root or on the Hub.
    """
    if model is not None:
        return model, *resolve_model(model)
    if not recipe.model:
        raise PlanError(recipe.name, "names no model", "pass `--model`, or write `model:`")
    return recipe.model, *resolve_model(recipe.model, below=recipe.root, asker=recipe.name)


def _data(context: RunContext, recipe: Recipe, base: Base) -> dict[str, tuple[Artifact, TokenSet]]:
    """Makes the recipe's token sets; those it is judged by share no document with the others."""
    data = {}
    seen: tuple[str, ...] = ()
    for name, judges in sets_of(recipe):
        data[name] = make_data(context, name, recipe.data[name], recipe.root, base, seen)
        if judges:
            seen = (*seen, *data[name][1].documents)
    return data


def _stages(
    context: RunContext,
    recipe: Recipe,
    base: Base,
    data: Mapping[str, tuple[Artifact, TokenSet]],
    ignore_keys: tuple[str, ...],
) -> tuple[Recipe, list[Artifact], list[dict[str, Any]]]:
    """Makes all stages: the recipe with searches replaced by their choice, artifacts, searches."""
    made: list[Artifact] = []
    carried: list[Stage] = []
    searches: list[dict[str, Any]] = []
    for stage in recipe.stages:
        source = made[-1] if made else base
        tokens = data.get(stage.data)
        if stage.kind == "search":
            teacher = _teacher(context, recipe, heal_of(stage.entry), base)
            found = run_search(context, stage, source, data, ignore_keys, teacher)
            made += found.made
            carried += found.stages
            searches.append(found.table)
            continue
        teacher = _teacher(context, recipe, stage, base) if stage.kind == "heal" else None
        made.append(run_stage(context, stage, source.path, source.id, tokens, teacher))
        carried.append(stage)
    return replace(recipe, stages=tuple(carried)), made, searches


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
    base: Base
    data: Mapping[str, tuple[Artifact, TokenSet]]
    stages: list[Artifact]
    searches: list[dict[str, Any]]
    exports: list[Artifact]
    found: Verification


def _finished(context: RunContext, recipe: Recipe, out: Path, made: _Made) -> dict[str, Any]:
    # Imported here: it brings matplotlib, which a plan has no use for.
    from prune_export.report import write_report

    base, data, stages, exports = made.base, made.data, made.stages, made.exports
    report = report_of(context, recipe, base, data, stages, exports, made.found)
    report["recipe"]["text"] = made.asked
    report["searches"] = made.searches
    result = Result(out)
    named: dict[str, Artifact] = {}
    for stage, artifact in zip(recipe.stages, stages, strict=True):
        named[f"stages.{len(named)}.{stage.kind}"] = artifact
    if stages:
        result.add(stages[-1])
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
