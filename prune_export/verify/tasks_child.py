"""The process that runs lm-eval: a JSON request on standard input, one JSON line as the answer."""

import json
import os
import sys
from typing import Any

from prune_export.verify.worker import die_with_parent


def evaluate(asked: dict[str, Any]) -> dict[str, Any]:
    """Runs lm-eval for the request; gives the part of its results that `tasks.scores` reads."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    done = simple_evaluate(
        model="hf",
        model_args={"pretrained": asked["checkpoint"], "trust_remote_code": False},
        tasks=asked["tasks"],
        device=asked["device"],
        limit=asked["samples"],
        batch_size=8,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=TaskManager(include_path=asked["include"]),
    )
    kept = ("results", "n-samples", "group_subtasks")
    return {key: done.get(key, {}) for key in kept}


def main() -> None:
    """Answers one request."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps(evaluate(json.load(sys.stdin)), default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
