"""Rounds of prune and heal: the artifacts of the stages written out, kept and named as rounds."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from prune_export.report.reading import Report

RECIPE = """\
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
stages:
STAGES
verify: {generation: false}
"""
ROUNDS = """\
  - iterate:
      rounds: 2
      stages:
        - prune: {method: block_influence, remove: AMOUNT}
        - heal: {method: lora, rank: 2, steps: 2, batch: 2}
"""
WRITTEN_OUT = """\
  - prune: {method: block_influence, remove: 2}
  - heal: {method: lora, rank: 2, steps: 2, batch: 2}
  - prune: {method: block_influence, remove: 1}
  - heal: {method: lora, rank: 2, steps: 2, batch: 2, seed: 1}
"""


class Told:
    def __init__(self) -> None:
        self.said: list[str] = []

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Any:
        del label, total
        yield self

    def advance(self, steps: float = 1) -> None:
        del steps

    def note(self, text: str) -> None:
        del text

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def recipe(root: Path, stages: str) -> Recipe:
    return Recipe.parse(RECIPE.replace("STAGES", stages), root=root)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_rounds_are_the_artifacts_of_the_stages_written_out(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    rounds = recipe(corpus, ROUNDS.replace("AMOUNT", "3"))
    notes = [stage.note for stage in plan(rounds, str(tiny_llama), options).stages[:4]]
    assert [note.partition(";")[0] for note in notes] == ["round 1 of 2"] * 2 + ["round 2 of 2"] * 2
    first = Told()
    report = run(rounds, str(tiny_llama), options, first).report
    assert [stage["parameters"].get("remove") for stage in report["stages"]] == [2, None, 1, None]
    assert "prune: block_influence, round 2 of 2" in first.said
    # The same artifacts: nothing is made again.
    second = Told()
    other = run(
        recipe(corpus, WRITTEN_OUT),
        str(tiny_llama),
        replace(options, out=options.out.with_name("other")),
        second,
    )
    assert sum(line.endswith("already there") for line in second.said) >= 4
    assert [s["id"] for s in other.report["stages"]] == [s["id"] for s in report["stages"]]
    # Scored again, on the model of the round before: 4 blocks of the first round's 6.
    assert [len(s["log"]["block_scores"]) for s in report["stages"][::2]] == [6, 4]
    # Named in the report and the card.
    reading = Report.load(options.out / "report.json")
    assert [stage.round for stage in reading.stages] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    card = (options.out / "README.md").read_text(encoding="utf-8")
    assert "`block_influence`, round 2 of 2: removed" in card
    page = (options.out / "report.html").read_text(encoding="utf-8")
    assert "Heal: lora, round 1 of 2" in page
    assert "healed with lora in 2 rounds" in page


@pytest.mark.parametrize(
    ("amount", "problem"),
    [("[3, 3]", "3 of 3 blocks would be removed"), ("[6, 1]", "6 of 6 blocks")],
)
def test_rounds_that_leave_no_block_are_refused_in_the_plan(
    amount: str, problem: str, tiny_llama: Path, corpus: Path, options: Options
) -> None:
    with pytest.raises(PlanError, match=problem) as caught:
        plan(recipe(corpus, ROUNDS.replace("AMOUNT", amount)), str(tiny_llama), options)
    assert "block_influence, round" in caught.value.where


def test_too_little_healing_text_is_refused_in_the_plan(
    tiny_llama: Path, corpus: Path, options: Options, tmp_path: Path
) -> None:
    (tmp_path / "short").mkdir()
    for name, text in (("calibration.txt", "word " * 400), ("healing.jsonl", '{"text": "ab"}')):
        (tmp_path / "short" / name).write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"data\.healing|healing"):
        plan(recipe(tmp_path / "short", ROUNDS.replace("AMOUNT", "2")), str(tiny_llama), options)
