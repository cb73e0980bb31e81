"""Runs prune and heal stages, through the store.

What a stage depends on (its key) is decided here, and with it whether work is done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import (
    CalibrationContext,
    ExtraPass,
    ModelView,
    TokenSet,
    keep_answers,
)
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import write_grids
from prune_export.contracts import Refitting, Teacher, TimesMachine, Work
from prune_export.errors import PlanError
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base
from prune_export.execution.timing import TimedEngines
from prune_export.recipe import Stage
from prune_export.store import Artifact, Key
from prune_export.surgery import rewrite

_ANSWERS_VERSION: Final = "1"


def run_stage(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet] | None,
    teacher: Base | None = None,
) -> Artifact:
    """The checkpoint after a prune or heal stage; `data` is the token set that the stage names.

    A heal that learns from a `teacher` depends on it.

    Raises:
        PlanError: a heal stage has no data.
    """
    if stage.kind != "heal":
        return run_prune(context, stage, source, source_id, data)
    if data is None:
        raise PlanError(f"heal {stage.name}", f"needs the data `{stage.data}`", "define it")
    return run_heal(context, stage, source, source_id, data, teacher)


def run_prune(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet] | None,
) -> Artifact:
    """Prunes or quantizes a checkpoint; the artifact's `record["log"]` says how and why.

    Where the weights lie on grids, these lie beside them.
    """
    parameters = stage.parameters()
    if isinstance(stage.entry, TimesMachine) and stage.entry.times_machine:
        parameters["timed on"] = context.machine.timing_identity()
    key = Key(
        stage.kind,
        stage.name,
        stage.entry.VERSION,
        parameters,
        (source_id,),
        data[1].fingerprint if data else None,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        checkpoint = Checkpoint.open(source)
        arch = checkpoint.arch(context.ignore_keys)
        asked = stage.entry.statistics(arch)
        if isinstance(stage.entry, Refitting):
            asked += stage.entry.passes_with_data(arch)
        view = ModelView(arch, checkpoint, {})
        if asked and data:
            engines = TimedEngines(context, arch, source, source_id)
            calibration = CalibrationContext(
                data[1], work.machine, work.scratch, work.progress, engines
            )
            view = replace(view, context=calibration)
            first = [statistic for statistic in asked if not isinstance(statistic, ExtraPass)]
            view = replace(view, results=view.gather(first))
        decision = stage.entry.decide(view)
        after = rewrite(
            checkpoint,
            arch,
            decision.edits,
            files,
            ram_bytes=work.machine.ram_bytes,
            progress=work.progress,
        )
        if decision.grids:
            write_grids(files, decision.grids)
        return {
            "log": dict(decision.log),
            "parameters": after.arch(context.ignore_keys).parameters(),
            "bytes": after.nbytes,
        }

    return context.make(key, f"{stage.kind}: {stage.title}", build)


def answers(
    context: RunContext, teacher: Base, tokens: TokenSet, outcomes: int, temperature: float
) -> Artifact:
    """What a teacher says to `tokens`, `outcomes` tokens a position; whoever learns from it."""
    parameters = {"outcomes": outcomes, "temperature": temperature}
    key = Key("answers", "teacher", _ANSWERS_VERSION, parameters, (teacher.id,), tokens.fingerprint)

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        opened = Checkpoint.open(teacher.path)
        keep_answers(
            opened,
            CalibrationContext(tokens, work.machine, work.scratch, work.progress),
            files,
            outcomes=outcomes,
            temperature=temperature,
            arch=opened.arch(context.ignore_keys),
            team=work.team,
        )
        return {"teacher": teacher.name, "bytes": sum(f.stat().st_size for f in files.iterdir())}

    return context.make(key, f"keep what {teacher.name} says", build)


def run_heal(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet],
    teacher: Base | None = None,
) -> Artifact:
    """Heals a checkpoint; `record["log"]` of the artifact holds the loss curve.

    Only a stage that learns from a teacher has one, and depends on it.
    """
    key = Key(
        "heal",
        stage.name,
        stage.entry.VERSION,
        stage.parameters(),
        (source_id, f"teacher:{teacher.id}") if teacher else (source_id,),
        data[1].fingerprint,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        if teacher is not None:
            blocks = survivors(context, source_id, teacher)
            work = replace(work, teacher=_teaching(context, teacher, data[1], blocks))
        record = stage.entry.heal(source, data[1], files, work)
        after = Checkpoint.open(files)
        told = {"teacher": {"model": teacher.name, "id": teacher.id}} if teacher else {}
        return {
            "log": dict(record.log) | told,
            "steps": record.steps,
            "trained_tokens": record.trained_tokens,
            "bytes": after.nbytes,
            "parameters": after.arch(context.ignore_keys).parameters(),
        }

    return context.make(key, f"heal: {stage.title}", build)


def survivors(context: RunContext, source_id: str, dense: Base) -> tuple[int, ...] | None:
    """The block of the dense model that each of a checkpoint's was, by what its stages dropped.

    None where the checkpoint was not made of it.
    """
    dropped: list[set[int]] = []
    while source_id != dense.id:
        artifact = context.store.get(source_id)
        if artifact is None or not artifact.inputs:
            return None
        dropped.append(
            {int(block) for block in artifact.record.get("log", {}).get("dropped") or ()}
        )
        source_id = artifact.inputs[0]
    left = list(range(Checkpoint.open(dense.path).arch(context.ignore_keys).layers))
    for gone in reversed(dropped):
        left = [block for place, block in enumerate(left) if place not in gone]
    return tuple(left)


def _teaching(
    context: RunContext, teacher: Base, tokens: TokenSet, blocks: tuple[int, ...] | None
) -> Teacher:
    def kept(outcomes: int, temperature: float) -> Path:
        return answers(context, teacher, tokens, outcomes, temperature).path

    return Teacher(teacher.path, teacher.id, kept, blocks)
