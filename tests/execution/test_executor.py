"""Workers of a search that are killed, crash or fail: what reaches the user."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError, StageError
from prune_export.execution import executor
from prune_export.execution.context import RunContext
from prune_export.execution.executor import Desk, Done, Job, open_executor
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Search
from prune_export.store import Store


class Doomed(Desk):
    """A desk whose jobs end as their labels say."""

    @staticmethod
    def of(context: RunContext, workers: int) -> Desk:
        own = Desk.of(context, workers)
        return Doomed(own.store, own.machine, own.force, own.ignore_keys, own.command)

    def work(self, job: Job) -> Done:
        match job.label:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crashed":
                os.abort()
            case "refused":
                raise PlanError("here", "is not possible", "do that")
            case "failed":
                raise ValueError("seven is not a number")
        return Done((), 1.0)


def search(**changes: Any) -> Search:
    from prune_export.recipe.search import Target

    return replace(Search(target=Target(parameters=0.5), validation="evaluation"), **changes)


@pytest.mark.slow
def test_what_happens_to_ray_workers_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(executor, "Desk", Doomed)
    machine = Machine("cpu", 4 << 30, 0, 1)
    context = RunContext(Store(tmp_path / "store"), machine, Silent(), command="prune-export run x")

    def job(label: str) -> Job:
        return Job(label, (), tmp_path, "id", {}, "evaluation")

    with open_executor(search(executor="ray", workers=1), context) as each:
        assert [done for _, done in each([job("good")], "trying")] == [Done((), 1.0)]
        for label, words in (
            ("killed", "lost with its Ray worker: WorkerCrashedError"),
            ("crashed", "lost with its Ray worker: WorkerCrashedError"),
            ("failed", "failed on a Ray worker: ValueError: seven is not a number"),
        ):
            with pytest.raises(StageError, match=words) as caught:
                list(each([job(label)], "trying"))
            assert caught.value.where == f"search  {label}"
            assert "prune-export run x" in caught.value.fix
        with pytest.raises(PlanError, match="is not possible"):
            list(each([job("refused")], "trying"))
