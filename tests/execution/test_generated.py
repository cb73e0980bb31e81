"""Recipes that train on what a model says: from plan to windows, through the store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from prune_export.calibrate import TokenSet, read_samples
from prune_export.errors import PruneExportError
from prune_export.execution import Options, plan, run
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import base_from_directory
from prune_export.execution.said import make_data
from prune_export.generated import ANSWERS, local
from prune_export.generated.prompts import bundled
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Generated, Recipe
from prune_export.store import Artifact, Store
from prune_export.verify import Engine, drive
from tests.killed import Killed, killed_after

RECIPE = """\
recipe: 1
data:
  healing: {generated: KEYS, samples: 6, length: 32}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: full, steps: 3, batch: 2, learning_rate: 1.0e-3, objective: distill}
verify: {generation: false}
"""
FREE = "{from: dense, prompts: none, new_tokens: 24}"


def recipe(root: Path, keys: str) -> Recipe:
    return Recipe.parse(RECIPE.replace("KEYS", keys), root=root)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def data(
    one: Recipe, model: Path, options: Options, progress: Any = None
) -> tuple[Artifact, TokenSet]:
    context = RunContext(Store(options.store), options.machine, progress or Silent())
    base = base_from_directory(context, str(model), model, None)
    return make_data(context, "healing", one.data["healing"], one.root, base)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_free_samples_of_the_dense_model_heal_without_any_text(
    tiny_llama: Path, tmp_path: Path, options: Options
) -> None:
    one = recipe(tmp_path, FREE)
    steps = {stage.kind: stage for stage in plan(one, str(tiny_llama), options).stages}
    assert "no prompt (free samples)" in steps["ask"].note
    assert steps["ask"].seconds > 0
    result = run(one, str(tiny_llama), options)
    report = json.loads((result.out / "report.json").read_text())
    told = report["data"]["healing"]["generated"]
    assert (told["from"], told["prompts"], told["temperature"]) == ("dense", "none", 1.0)
    assert report["data"]["healing"]["samples"] == 6
    kept = Store(options.store).garbage()
    assert [name for name in kept if not name.startswith("verify")] == []


class Here:
    """What a `Session` does, in this process: starting others is most of the time."""

    def __init__(self, engine: Engine, machine: Machine) -> None:
        self.runner = engine.open(machine)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def drawn(self, prompts: Any, new: int, *, task: Any, **keys: Any) -> list[list[int]]:
        return drive.drawn(self.runner, prompts, new, task.advance, **keys)


@pytest.mark.slow
def test_the_same_answers_come_again_and_a_killed_run_ends_in_them(
    tiny_llama: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To bundled prompts, by a chat template; with batches of 3, of which the second is killed."""
    model = tmp_path / "talking"
    shutil.copytree(tiny_llama, model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(model)
    monkeypatch.setattr(local, "ROWS", 3)
    monkeypatch.setattr(local, "Session", Here)
    one = recipe(tmp_path, "{from: dense, new_tokens: 9, answers: 16, seed: 3}")
    whole, tokens = data(one, model, options)
    samples = read_samples(Store(options.store).root / whole.record["answers"] / "files" / ANSWERS)
    assert [sample.prompt for sample in samples] == list(range(16))
    assert samples[0].messages == [{"role": "user", "content": bundled()[0]}]
    assert all(0 < len(sample.ids or ()) - sample.given <= 9 for sample in samples)
    assert len({sample.answer for sample in samples}) == 16
    broken = replace(options, store=tmp_path / "again")
    with pytest.raises(Killed):
        data(one, model, broken, killed_after(70))
    journal = next(broken.store.glob("generated-*.partial/scratch/answers.jsonl"))
    assert len(journal.read_bytes().splitlines()) in (3, 6, 9)
    with journal.open("ab") as file:
        file.write(b'{"prompt"')
    again, same = data(one, model, broken)
    assert again.id == whole.id
    assert again.record["answers"] == whole.record["answers"]
    assert same.fingerprint == tokens.fingerprint
    assert tokens.counted is not None


REFUSED = {
    "a server that nobody allowed": (
        "{from: 'http://127.0.0.1:9/v1', model: m}", "nobody has allowed"
    ),
    "a directory that is not there": ("{from: nowhere}", "is neither `dense`, nor an address"),
    "one that is elsewhere": ("{from: ../elsewhere}", "leaves the data root"),
    "one that is no model": ("{from: empty}", "neither a model's directory"),
    "too few answers": ("{answers: 1, new_tokens: 4}", "cannot give 6 windows of 32"),
    "an answer too long": ("{new_tokens: 9999}", "what answers takes 256"),
    "files that are not there": ("{prompts: [none.txt]}", "names no file"),
    "a template that is not there": ("{template: true}", "has no chat template"),
    "the same answer again": (
        "{prompts: [one.txt], temperature: 0, new_tokens: 9}", "cannot give 6 windows"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_in_the_plan(
    name: str, tiny_llama: Path, tmp_path: Path, options: Options
) -> None:
    keys, says = REFUSED[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("One?\n")
    with pytest.raises(PruneExportError, match=says) as caught:
        plan(recipe(tmp_path, keys), str(tiny_llama), options)
    assert "data.healing" in str(caught.value)
    assert not options.store.exists()


def test_limits_are_in_no_id(tiny_llama: Path, tmp_path: Path, options: Options) -> None:
    one, other = (
        recipe(tmp_path, keys).data["healing"]
        for keys in ("{answers: 16}", "{answers: 16, attempts: 9, seconds: 3, at_once: 1}")
    )
    assert isinstance(one, Generated)
    assert isinstance(other, Generated)
    assert one != other
    assert one.generated.drawing() == other.generated.drawing()


def test_answers_of_a_server_are_planned_with_its_terms(
    tiny_llama: Path, tmp_path: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNE_EXPORT_SEND_TO", "https://a.example")
    one = recipe(tmp_path, "{from: 'https://a.example/v1', model: big}")
    steps = {stage.kind: stage for stage in plan(one, str(tiny_llama), options).stages}
    note = steps["ask"].note
    assert "sends 96 bundled prompts" in note
    assert "to https://a.example/v1 for 96 answers" in note
    assert "terms of use" in note
    assert Recipe.parse(one.to_yaml(), root=tmp_path).data == one.data
