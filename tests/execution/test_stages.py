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
from prune_export.store import Artifact, Key, Store

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


ELSEWHERE = Machine("cpu", 8 << 30, 0, 2)
"""The same, but with more threads."""


@pytest.mark.parametrize(
    ("target", "apart"),
    [
        ("target: {speedup: 1.5}", True),
        ("target: {parameters: 0.8}", False),
        ("sparsity: 0.5", False),
    ],
)
def test_what_timed_this_machine_is_of_this_machine(
    target: str, apart: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    """Widths that are right for one processor are not taken for another's."""
    stage = stage_of(f"{{prune: {{method: ziplm, {target}}}}}")
    ids = {key_of(stage, machine, tiny_llama, tmp_path) for machine in (CPU, CPU, ELSEWHERE)}
    assert len(ids) == (2 if apart else 1)


def test_an_id_that_no_time_decided_is_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    stage = stage_of("{prune: {method: ziplm, sparsity: 0.5}}")
    was = Key("prune", "ziplm", "1", stage.parameters(), ("model-0",), None)
    assert key_of(stage, CPU, tiny_llama, tmp_path) == was.id


def key_of(stage: Stage, machine: Machine, source: Path, store: Path) -> str:
    """The id of what a stage would make; nothing is made."""

    class Asked(Exception):
        pass

    class Keys(RunContext):
        def make(self, key: Key, label: str, build: Any) -> Artifact:
            raise Asked(key.id)

    with pytest.raises(Asked) as asked:
        run_stage(Keys(Store(store), machine, Silent()), stage, source, "model-0", None)
    return str(asked.value)
