import importlib.util
import json
from pathlib import Path

import pytest

from prune_export.errors import MissingExtra, StageError, VerifyError
from prune_export.machine import Machine
from prune_export.verify.tasks import check_tasks, measure_tasks, scores

HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None

COLOURS = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["red", "green", "blue"]
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_scores_by_hand() -> None:
    """A group's sample count is the sum of its tasks'; standard errors and labels are dropped."""
    found = scores(
        {
            "results": {
                "mmlu": {"acc,none": 0.25, "acc_stderr,none": 0.01, "alias": "mmlu"},
                "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.75},
            },
            "n-samples": {
                "gsm8k": {"original": 100, "effective": 8},
                "mmlu_law": {"original": 100, "effective": 5},
                "mmlu_art": {"original": 100, "effective": 7},
            },
            "group_subtasks": {"mmlu": ["mmlu_law", "mmlu_art"]},
        }
    )
    assert found == {
        ("mmlu", "acc"): (0.25, 12),
        ("gsm8k", "exact_match (strict-match)"): (0.5, 8),
        ("gsm8k", "exact_match (flexible-extract)"): (0.75, 8),
    }


@pytest.mark.parametrize("name", ["tasks/mine.yaml", "../mine", "/etc/passwd", ""])
def test_paths_are_refused(name: str) -> None:
    with pytest.raises(VerifyError, match="name of an lm-eval task"):
        check_tasks([name])


def test_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"prune-export\[eval\]"):
        check_tasks(["mmlu"])
    check_tasks([])


def test_no_tasks_no_work(tiny: Path, machine: Machine) -> None:
    assert measure_tasks([], tiny, machine) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
@pytest.mark.skipif(not HAS_LM_EVAL, reason="the extra `eval` is not installed")
def test_local_task_without_a_network(
    tiny: Path,
    other: Path,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lines = [{"question": f"Colour {at} is", "answer": at % 3} for at in range(12)]
    data = tmp_path / "colours.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colours.yaml").write_text(COLOURS.format(data=data))
    [found] = measure_tasks(["colours"], other, machine, dense=tiny, samples=9, include=folder)
    assert (found.name, found.metric, found.samples) == ("colours", "acc", 9)
    assert 0 <= found.pruned <= 1
    assert found.dense is not None
    with pytest.raises(StageError, match="no_such_task"):
        measure_tasks(["no_such_task"], tiny, machine, include=folder)
