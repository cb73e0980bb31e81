"""The process that runs lm-eval: a JSON request on standard input, one JSON line as the answer."""

import json
import os
import sys
from importlib.metadata import EntryPoint
from typing import Any

from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.worker import die_with_parent


def evaluate(asked: dict[str, Any]) -> dict[str, Any]:
    """Runs lm-eval for the request; gives the part of its results that `tasks.scores` reads."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, options = _model(asked)
    done = simple_evaluate(
        model=model,
        model_args=options,
        tasks=asked["tasks"],
        device=asked["device"],
        limit=asked["samples"],
        batch_size=8 if options else 1,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=TaskManager(include_path=asked["include"]),
    )
    kept = ("results", "n-samples", "group_subtasks")
    return {key: done.get(key, {}) for key in kept}


def _model(asked: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The model, and the keys with which lm-eval makes it; None where it is made already."""
    if "engine" not in asked:
        return "hf", {"pretrained": asked["checkpoint"], "trust_remote_code": False}
    kind: Any = EntryPoint("engine", asked["model"], "prune_export.task_models").load()
    return kind.of(Engine.from_json(asked["engine"]), Machine(**asked["machine"])), None


def main() -> None:
    """Answers one request."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(evaluate(json.load(sys.stdin)), default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
