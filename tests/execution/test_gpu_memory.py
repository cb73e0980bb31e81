"""A GPU is shared with processes that verify, and with other workers: what a run leaves to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.errors import StageError
from prune_export.execution.context import RunContext
from prune_export.execution.executor import Desk
from prune_export.execution.stages import run_prune
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe
from prune_export.store import Key, Store

GPU = Machine("cuda", 8 << 30, 80 << 30, 4, 90)


@pytest.mark.parametrize(("device", "times"), [("cuda", 2), ("cpu", 0)])
def test_memory_is_handed_back_after_each_artifact(
    device: Any, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after one that failed, as the run may go on with others."""
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    machine = Machine(device, 8 << 30, 0, 1)
    context = RunContext(Store(tmp_path / "store"), machine, Silent())
    context.make(Key("test", "good", "1", {}, ()), "good", lambda files, work: {})

    def bad(files: Path, work: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(StageError, match="CUDA out of memory"):
        context.make(Key("test", "bad", "1", {}, ()), "bad", bad)
    assert len(freed) == times


def test_what_is_free_of_a_gpu_decides_no_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    """A run goes on from what another made while less, or more, of it was free."""
    stage = Recipe.parse("recipe: 1\nstages: [{prune: {method: deepest, remove: 1}}]").stages[0]
    made = []
    for free in (1 << 30, 80 << 30):
        context = RunContext(Store(tmp_path / "store"), Machine("cpu", 8 << 30, free, 1), Silent())
        made.append(run_prune(context, stage, tiny_llama, "model-0", None))
    assert made[0].id == made[1].id
    assert len(list((tmp_path / "store").glob("prune-*"))) == 1


def test_workers_share_a_gpus_memory(tmp_path: Path) -> None:
    context = RunContext(Store(tmp_path / "store"), GPU, Silent())
    assert Desk.of(context, 4).machine.gpu_bytes == 20 << 30
