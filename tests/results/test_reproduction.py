"""A result made again: what came out the same, what did not, and that it says so."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.cli import main
from prune_export.errors import CheckpointError, RecipeError
from prune_export.execution import Options, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from prune_export.results.reproduction import (
    Made,
    Reproduction,
    compared,
    judgement,
    places,
    read_made,
    reproduce,
)
from prune_export.system.written import LOCK
from prune_export.verify.results import Perplexity
from tests.hub.fake_hub import FakeHub
from tests.hub.made import called, uploading
from tests.measured_here import install

RECIPE = """\
recipe: 1
data:
  healing: {files: [healing.jsonl], samples: 8, length: 32}
  evaluation: {files: [evaluation.txt], samples: 8, length: 32}
stages:
  - prune: {method: deepest, remove: 2}
  - heal: {method: full, steps: 2, batch: 2, learning_rate: 1.0e-3, compute_dtype: float32}
verify:
  parity: false
  generation: false
  quality: {perplexity: evaluation}
"""


def options(folder: Path) -> Options:
    machine = Machine.detect(device="cpu", threads=1)
    return Options(folder / "out", folder / "store", machine)


@pytest.fixture(scope="module")
def made(
    tiny_llama: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        recipe = Recipe.parse(RECIPE, root=corpus)
        yield run(recipe, str(tiny_llama), options(folder)).out


@pytest.fixture
def first(made: Path) -> Made:
    return read_made(str(made))


def changed(first: Made, name: str, value: Any = "0" * 64) -> Made:
    """The same, with other bytes in an artifact."""
    lock = copy.deepcopy(dict(first.lock))
    files = lock["artifacts"][name]["files"]
    files[next(iter(files))] = value
    return replace(first, lock=lock)


def differing(found: Reproduction) -> list[str]:
    return [one.what for one in found.findings if not one.same]


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_run_comes_out_again(made: Path, tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    chosen = places(tmp_path / "again", options(tmp_path))
    found = reproduce(str(made), chosen, model=str(tiny_llama), data_root=corpus)
    assert found.ok, found
    assert [one.what for one in found.findings] == [
        "the result itself", "data.evaluation", "data.healing", "stages.0.prune", "stages.1.heal",
    ]  # fmt: skip
    assert {one.how for one in found.findings} == {"bytes"}
    assert found.reasons == ()
    # It was made anew, and not taken from the first run's store.
    assert (tmp_path / "again" / "result" / LOCK).is_file()
    assert (tmp_path / "again" / "store").is_dir()
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("measured_here")
def test_the_command_ends_in_one_where_it_differs(
    made: Path, tiny_llama: Path, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # A lock that claims other pruned weights than the recipe gives; nothing of it trains.
    text = RECIPE[: RECIPE.index("  - heal")] + "verify: {parity: false, generation: false}\n"
    text = text.replace("  healing: {files: [healing.jsonl], samples: 8, length: 32}\n", "")
    other = run(Recipe.parse(text, root=corpus), str(tiny_llama), options(tmp_path)).out
    for status, claim in ((0, None), (1, "0" * 64)):
        if claim:
            lock = json.loads((other / LOCK).read_text(encoding="utf-8"))
            lock["artifacts"]["stages.0.prune"]["files"]["model.safetensors"] = claim
            (other / LOCK).write_text(json.dumps(lock), encoding="utf-8")
        arguments = ["reproduce", str(other), "--model", str(tiny_llama), "--data-root",
                     str(corpus), "--out", str(tmp_path / "again"), "--threads", "1"]  # fmt: skip
        monkeypatch.setattr("sys.argv", ["prune-export", *arguments, "--quiet"])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert ended.value.code == status, shown
        assert ("DIFFERS" in shown.out) == bool(claim)
    assert "stages.0.prune" in shown.err


def test_other_pruned_bytes_are_a_difference(first: Made) -> None:
    found = compared("x", first, changed(first, "stages.0.prune"))
    assert differing(found) == ["stages.0.prune"]
    (said,) = [one.said for one in found.findings if not one.same]
    assert said.startswith("other bytes: ")


def test_other_trained_bytes_are_judged_by_what_was_measured(first: Made) -> None:
    found = compared("x", first, changed(first, "stages.1.heal"))
    assert found.ok
    judged = {one.what for one in found.findings if one.how == "quality"}
    assert judged == {"stages.1.heal", "perplexity of healed"}


def test_worse_quality_after_training_is_a_difference(first: Made) -> None:
    again = changed(first, "stages.1.heal")
    assert again.checks is not None
    worse = [
        replace(one, value=one.value * 1.1, losses=[loss + math.log(1.1) for loss in one.losses])
        for one in again.checks.perplexity
    ]
    again = replace(again, checks=replace(again.checks, perplexity=worse))
    assert differing(compared("x", first, again)) == ["perplexity of healed"]


def test_training_that_nobody_measured_cannot_be_judged(first: Made) -> None:
    again = replace(changed(first, "stages.1.heal"), checks=None)
    assert differing(compared("x", first, again)) == ["quality"]


def test_what_is_missing_or_new_is_a_difference(first: Made) -> None:
    lock = copy.deepcopy(dict(first.lock))
    lock["artifacts"]["export.onnx"] = lock["artifacts"].pop("stages.1.heal")
    found = compared("x", first, replace(first, lock=lock))
    assert differing(found) == ["stages.1.heal", "export.onnx"]


def test_reasons_name_versions_and_instructions(first: Made) -> None:
    machine = dict(first.report["machine"]) | {"torch": "1.0", "instructions": "neon"}
    before = replace(first, report=dict(first.report) | {"machine": machine})
    found = compared("x", before, changed(first, "stages.0.prune"))
    assert [one.split(":")[0] for one in found.reasons] == ["instructions", "torch"]
    notes = {"notes": ["Healing took 1 of 2 steps, as time was short."]}
    short = replace(first, report=dict(first.report) | notes)
    (reason,) = compared("x", short, changed(first, "stages.0.prune")).reasons
    assert reason.startswith("the first run had a limit of time")
    assert compared("x", before, first).reasons == ()


def test_a_file_that_was_changed_since_is_found(made: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(made, tmp_path / "out"))
    config = copied / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    found = compared("x", read_made(str(copied)), read_made(str(made)))
    assert differing(found) == ["the result itself"]
    assert "config.json" in found.findings[0].said


def test_another_base_is_refused_before_any_work(
    made: Path, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    chosen = places(tmp_path / "again", options(tmp_path))
    with pytest.raises(CheckpointError, match="is not the model that the result was made from"):
        reproduce(str(made), chosen, model=str(other), data_root=corpus)
    with pytest.raises(RecipeError, match="which is not on the Hub"):
        reproduce(str(made), chosen, data_root=corpus)
    assert not chosen.out.exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("prune_recipe.yaml", "recipe: 1\n", "is not the recipe that the lock"),
        (LOCK, "{}", "is not a lock of this tool"),
        (LOCK, '{"recipe_sha256": 3, "base": [], "data": 7}', "is not a lock of this tool"),
        ("verify.json", "{}", "is not what this tool writes"),
    ],
)
def test_broken_papers_are_refused(
    made: Path, tmp_path: Path, name: str, text: str, said: str
) -> None:
    copied = Path(shutil.copytree(made, tmp_path / "out"))
    (copied / name).write_text(text, encoding="utf-8")
    with pytest.raises((CheckpointError, RecipeError), match=said):
        read_made(str(copied))


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_what_is_on_the_hub_comes_out_again_without_its_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    text = "recipe: 1\nstages:\n  - prune: {method: deepest, remove: 2}\n"
    text += "verify: {parity: false, generation: false}\n"
    other = run(Recipe.parse(text), str(tiny_llama), options(tmp_path)).out
    work = {"work": str(tmp_path / "again"), "model": str(tiny_llama)}
    with FakeHub() as fake:
        calls = [
            uploading(other, "me/model"),
            {"function": "reproduce", "arguments": {"target": "me/model"} | work},
            {"function": "reproduce", "arguments": {"target": "me/nothing"} | work},
        ]
        (sent, found, missing), _ = called(fake, tmp_path / "home", calls)
        asked = {line.rpartition("/")[2] for line in fake.requests if "/resolve/" in line}
    assert sent["commit"]
    assert found["ok"], found
    assert [one["what"] for one in found["findings"]] == ["stages.0.prune"]
    assert asked == {LOCK, "prune_recipe.yaml", "report.json", "verify.json"}
    assert missing["error"] == "RecipeError"


def perplexity(losses: list[float]) -> Perplexity:
    value = math.exp(sum(losses) / len(losses))
    return Perplexity("healed", value, len(losses), 32, 31 * len(losses), losses)


LOSSES = [2.0, 2.5, 1.5, 3.0, 2.2, 1.9, 2.4, 2.6]


def test_judgement_by_interval_and_by_pairs() -> None:
    before = perplexity(LOSSES)
    # Paired, a shift of 0.5 % is certain and too small to count; one of 10 % is within the interval
    # of the windows (which differ by 30 %), and counts.
    assert judgement(before, perplexity([one + 0.005 for one in LOSSES]))[0]
    assert not judgement(before, perplexity([one + 0.1 for one in LOSSES]))[0]
    assert not judgement(before, perplexity([one - 0.1 for one in LOSSES]))[0]
    assert not judgement(before, perplexity([one + 2 for one in LOSSES]))[0]
    # A shift that is as large but differs from window to window is not certain.
    noisy = [one + (0.5 if number % 2 else -0.45) for number, one in enumerate(LOSSES)]
    assert judgement(before, perplexity(noisy))[0]
    same, said = judgement(perplexity(LOSSES[:3]), perplexity(LOSSES[:3]))
    assert not same
    assert "too few" in said
    assert not judgement(before, replace(before, value=math.nan))[0]


def test_what_is_neither_a_directory_nor_a_hub_id_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory, and no Hub id"):
        read_made(str(tmp_path / "nowhere"))
