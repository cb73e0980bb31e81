"""Task scores in the Hub's own form, `.eval_results/*.yaml`, where the data are a benchmark there.

The Hub shows these on the model's page and on the benchmark's leaderboard, and takes them for the
datasets on its list alone; all other scores stand in the card's `model-index`. Only what was
measured on the whole test set is a result of the benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from prune_export.report.reading import Report
from prune_export.verify.results import Task

FOLDER: Final = ".eval_results"


@dataclass(frozen=True)
class Benchmark:
    """A dataset of the Hub's list: the id of its task, its questions, and which metric counts.

    The value is written in percent, as on the benchmark's leaderboard.
    """

    dataset: str
    task_id: str
    questions: int
    metric: str


BENCHMARKS: Final[Mapping[str, Benchmark]] = {
    # lm-eval has tasks of others on the list too, but by another protocol (GPQA), or the scale of
    # the values was not to be found (GSM8K).
    "mmlu_pro": Benchmark("TIGER-Lab/MMLU-Pro", "mmlu_pro", 12032, "exact_match (custom-extract)"),
}
"""By the names of lm-eval's tasks."""


def benchmark_of(task: Task) -> Benchmark | None:
    """The benchmark that a score is a result of; None where it is none."""
    known = BENCHMARKS.get(task.name)
    whole = (
        known is not None
        and not task.engine
        and (task.metric, task.samples) == (known.metric, known.questions)
    )
    return known if whole and math.isfinite(task.pruned) else None


def eval_result_files(report: Report) -> dict[str, str]:
    """The files for the Hub, by name: one for each benchmark that was measured."""
    found = {}
    for task in report.verification.tasks if report.verification else ():
        if known := benchmark_of(task):
            entry = EvalResultEntry(
                dataset_id=known.dataset,
                task_id=known.task_id,
                value=round(100 * task.pruned, 2),
                notes=f"lm-evaluation-harness, task {task.name}, {task.metric}",
            )
            text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            found[f"{FOLDER}/{known.task_id}.yaml"] = text
    return found
