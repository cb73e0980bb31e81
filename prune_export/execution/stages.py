"""Runs prune and heal stages, through the store.

What a stage depends on (its key) is decided here, and with it whether work is done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prune_export.calibrate import (
    CalibrationContext,
    ExtraPass,
    ModelView,
    TokenSet,
)
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Refitting, TimesMachine, Work
from prune_export.errors import PlanError
from prune_export.execution.context import RunContext
from prune_export.execution.timing import TimedEngines
from prune_export.recipe import Stage
from prune_export.store import Artifact, Key
from prune_export.surgery import rewrite


def run_stage(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet] | None,
) -> Artifact:
    """The checkpoint after a prune or heal stage; `data` is the token set that the stage names.

    Raises:
        PlanError: a heal stage has no data.
    """
    if stage.kind != "heal":
        return run_prune(context, stage, source, source_id, data)
    if data is None:
        raise PlanError(f"heal {stage.name}", f"needs the data `{stage.data}`", "define it")
    return run_heal(context, stage, source, source_id, data)


def run_prune(
    context: RunContext,
    stage: Stage,
    source: Path,
    source_id: str,
    data: tuple[Artifact, TokenSet] | None,
) -> Artifact:
    """Prunes a checkpoint; `record["log"]` of the artifact says what was removed and why."""
    parameters = stage.parameters()
    if isinstance(stage.entry, TimesMachine) and stage.entry.times_machine:
        parameters["timed on"] = context.machine.timing_identity()
    key = Key(
        "prune",
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
        return {
            "log": dict(decision.log),
            "parameters": after.arch(context.ignore_keys).parameters(),
            "bytes": after.nbytes,
        }

    return context.make(key, f"prune: {stage.name}", build)


def run_heal(
    context: RunContext, stage: Stage, source: Path, source_id: str, data: tuple[Artifact, TokenSet]
) -> Artifact:
    """Heals a checkpoint; `record["log"]` of the artifact holds the loss curve."""
    key = Key(
        "heal",
        stage.name,
        stage.entry.VERSION,
        stage.parameters(),
        (source_id,),
        data[1].fingerprint,
    )

    def build(files: Path, work: Work) -> Mapping[str, Any]:
        record = stage.entry.heal(source, data[1], files, work)
        after = Checkpoint.open(files)
        return {
            "log": dict(record.log),
            "steps": record.steps,
            "trained_tokens": record.trained_tokens,
            "bytes": after.nbytes,
            "parameters": after.arch(context.ignore_keys).parameters(),
        }

    return context.make(key, f"heal: {stage.name}", build)
