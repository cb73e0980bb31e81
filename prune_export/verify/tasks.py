"""Runs lm-eval tasks on a checkpoint or an engine, in a process of their own.

An engine is a model of lm-eval through an integration, which the entry point `engine` of the group
`prune_export.task_models` names: a class with `of(engine, machine)` and `close()`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final

from prune_export.errors import MissingExtra, StageError, VerifyError
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.verify.engine import Engine
from prune_export.verify.results import Task
from prune_export.verify.session import environment

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses, in the plan, tasks that cannot run.

    Raises:
        MissingExtra: lm-eval is not installed.
        VerifyError: a name is a path; a task file can run code, so a recipe may not name one.
    """
    for name in tasks:
        if not _NAME.fullmatch(name):
            raise VerifyError(
                "verify.quality.tasks",
                f"got {name!r}, expected the name of an lm-eval task",
                "name a task, and give the directory of your own task files as `include`",
            )
    for package in ("lm_eval", "accelerate", "peft"):
        if tasks and importlib.util.find_spec(package) is None:
            raise MissingExtra.of("verify.quality.tasks", package, "eval")


def measure_tasks(
    tasks: Sequence[str],
    pruned: Path,
    machine: Machine,
    *,
    dense: Path | None = None,
    samples: int | None = None,
    include: Path | None = None,
    progress: Progress | None = None,
) -> list[Task]:
    """Measures each metric of each task (and group) for `pruned`, and for `dense` if given.

    At most `samples` documents of each task, all unless given. A task gets its data from where
    lm-eval finds it: without a network, from the datasets cache, or from local files that a task
    file in the directory `include` names. Such files may hold Python: pass only your own.

    Raises:
        MissingExtra: lm-eval is not installed.
        StageError: lm-eval failed; with its last words.
    """
    check_tasks(tasks)
    if not tasks:
        return []
    with (progress or Silent()).task("lm-eval tasks", 1 + (dense is not None)) as task:
        found = _evaluate(tasks, pruned, machine, samples, include)
        task.advance()
        beside = _evaluate(tasks, dense, machine, samples, include) if dense else {}
        task.advance(dense is not None)
    return [
        Task(name, metric, beside.get((name, metric), (None, 0))[0], value, count)
        for (name, metric), (value, count) in found.items()
    ]


def measure_engine_tasks(
    tasks: Sequence[str],
    engine: Engine,
    machine: Machine,
    *,
    beside: Sequence[Task] = (),
    samples: int | None = None,
    include: Path | None = None,
    progress: Progress | None = None,
) -> list[Task]:
    """Measures each metric of each task on an engine itself, one request at a time.

    `beside` are the same tasks of the checkpoint: what the dense model reached stands there.

    Raises:
        MissingExtra: lm-eval is not installed.
        VerifyError: no integration brings a model for engines.
        StageError: lm-eval failed; with its last words.
    """
    check_tasks(tasks)
    model = task_model()
    if model is None:
        raise VerifyError(
            "verify.quality.tasks",
            "nothing that is installed evaluates engines with lm-eval",
            "install prune-export again, or write `engines: false` below `quality`",
        )
    with (progress or Silent()).task(f"lm-eval tasks on {engine.exporter}", 1) as task:
        asked = {"engine": engine.to_json(), "machine": asdict(machine), "model": model.value}
        found = _evaluate(tasks, engine.path, machine, samples, include, asked)
        task.advance()
    dense = {(one.name, one.metric): one.dense for one in beside}
    return [
        Task(name, metric, dense.get((name, metric)), value, count, engine.exporter)
        for (name, metric), (value, count) in found.items()
    ]


def task_model() -> EntryPoint | None:
    """The integration that makes an engine a model of lm-eval; None where none is installed."""
    return next(iter(entry_points(group="prune_export.task_models", name="engine")), None)


_Scores = dict[tuple[str, str], tuple[float, int]]


def _evaluate(
    tasks: Sequence[str],
    checkpoint: Path,
    machine: Machine,
    samples: int | None,
    include: Path | None,
    about_engine: Mapping[str, Any] | None = None,
) -> _Scores:
    """Evaluates a checkpoint, or an engine: (task, metric) -> (value, number of documents)."""
    asked = {
        "tasks": list(tasks),
        "checkpoint": str(checkpoint),
        "device": machine.device,
        "samples": samples,
        "include": str(include) if include else None,
        **(about_engine or {}),
    }
    # A task may need data from the Hub, so only the user decides whether there is a network.
    variables = environment(machine)
    variables.pop("HF_HUB_OFFLINE")
    if "HF_HUB_OFFLINE" in os.environ:
        variables["HF_HUB_OFFLINE"] = os.environ["HF_HUB_OFFLINE"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prune_export.verify.tasks_child"],
        input=json.dumps(asked),
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        words = "".join(f"\n    {line}" for line in done.stderr.splitlines()[-20:])
        raise StageError(
            f"lm-eval {', '.join(tasks)} on {checkpoint}",
            f"it ended with exit code {done.returncode}{words}",
            "see `lm-eval ls tasks`; without a network a task needs its data in the cache",
        )
    return scores(json.loads(done.stdout.splitlines()[-1]))


def scores(results: Mapping[str, Any]) -> _Scores:
    """Reads (task, metric) -> (value, documents) from lm-eval's `results` and `n-samples`.

    A metric's key is `acc,none` (metric and filter); `none` is dropped, and so are the standard
    errors and what is no number.
    """
    found: _Scores = {}
    for name, values in results["results"].items():
        counts = [v["effective"] for key, v in results["n-samples"].items() if key == name]
        counts = counts or [
            results["n-samples"][sub]["effective"]
            for sub in results["group_subtasks"].get(name, [])
            if sub in results["n-samples"]
        ]
        for key, value in values.items():
            metric, _, by = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if by and number and not metric.endswith("_stderr"):
                label = metric if by == "none" else f"{metric} ({by})"
                found[name, label] = (float(value), sum(counts))
    return found
