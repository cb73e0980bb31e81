"""What a stage's artifact depends on, and the one place that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError
from prune_export.execution.context import RunContext
from prune_export.execution.stages import run_stage
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe, Stage
from prune_export.store import Store

CPU = Machine("cpu", 8 << 30, 0, 1)


def stage_of(written: str) -> Stage:
    return Recipe.parse(f"recipe: 1\nstages: [{written}]").stages[0]


def context_on(machine: Machine, store: Path) -> RunContext:
    return RunContext(Store(store), machine, Silent())


def test_a_prune_stage_runs_without_data(tiny_llama: Path, tmp_path: Path) -> None:
    stage = stage_of("{prune: {method: deepest, remove: 1}}")
    made = run_stage(context_on(CPU, tmp_path), stage, tiny_llama, "model-0", None)
    assert made.id.startswith("prune-deepest-")
    assert len(made.record["log"]["dropped"]) == 1


def test_healing_without_data_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    text = (
        "recipe: 1\ndata: {healing: {files: [a.txt], length: 32}}\nstages: [{heal: {method: lora}}]"
    )
    stage: Any = Recipe.parse(text).stages[0]
    with pytest.raises(PlanError, match=r"heal lora\n  needs the data `healing`"):
        run_stage(context_on(CPU, tmp_path), stage, tiny_llama, "model-0", None)
