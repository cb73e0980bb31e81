"""`smaller` and `faster`: what is asked in one line becomes a recipe, and what is wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_export.cli.asking import _fraction, _limited, _times
from prune_export.errors import PlanError
from prune_export.recipe import Recipe, engines_of
from tests.cli.test_cli import DEEPEST


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    file = tmp_path / "Über uns" / "meine Notizen.txt"
    file.parent.mkdir()
    lines = (f"Zeile {n}: der Fluss fließt durch die Stadt." for n in range(4000))
    file.write_text("\n\n".join(lines), encoding="utf-8")
    return file


def test_amounts_are_read_as_people_write_them() -> None:
    for text, fraction in (("25%", 0.25), ("25", 0.25), ("0.25", 0.25), ("2.5%", 0.025)):
        assert _fraction(text) == pytest.approx(fraction)
    for text, times in (("1.5", 1.5), ("1.5x", 1.5), ("2×", 2.0), ("50%", 1.5)):
        assert _times(text) == pytest.approx(times)
    for text in ("a quarter", "0", "100%", "-5%", "nan"):
        with pytest.raises(PlanError, match="write for example `--by 25%`"):
            _fraction(text)
    for text in ("fast", "1", "0.5", "100"):
        with pytest.raises(PlanError, match=r"write for example `--by 1\.5`"):
            _times(text)


def test_precision_and_runtime_leave_the_first_engine_to_compare_with() -> None:
    recipe = Recipe.load("faster-1.5x")

    def left(precision: str | None, *runtimes: str) -> list[Any]:
        (override,) = _limited(recipe, precision, runtimes)
        return list(json.loads(override.partition("=")[2]))

    assert left("int8") == [
        {"onnx": {"precision": "fp32"}},
        {"ort_genai": {"precision": "int8"}},
        {"onnx": {"precision": "int8"}},
    ]
    coarse = {"ort_genai": {"precision": "int4"}, "quantize": {"method": "gptq"}}
    assert left("int4", "ort_genai") == [
        {"onnx": {"precision": "fp32"}}, {"ort_genai": {"precision": "int8"}}, coarse
    ]  # fmt: skip
    assert left("fp32") == [{"onnx": {"precision": "fp32"}}]
    assert left(None, "onnx") == [
        {"onnx": {"precision": "fp32"}}, {"onnx": {"precision": "int8"}}
    ]  # fmt: skip
    assert _limited(recipe, None, ()) == []
    with pytest.raises(PlanError, match="is none of those that are tried here: onnx, ort_genai"):
        _limited(recipe, None, ["tensorrt"])
    changed = Recipe.load("faster-1.5x", overrides=_limited(recipe, "int8", ()))
    assert len(changed.stages[0].entry.engines) == 3


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("smaller-25", {"parameters": 0.75}),
        ("smaller-40", {"parameters": 0.6}),
        ("faster-1.5x", {"speedup": 1.5}),
        ("faster-2x", {"speedup": 2.0}),
        ("fit-4GiB", {"bytes": "4GiB"}),
    ],
)
def test_each_bundled_recipe_chooses_over_precision_too(name: str, target: dict[str, Any]) -> None:
    search = Recipe.load(name).stages[0].entry
    asked = search.target.model_dump()
    assert {key: asked[key] for key in target} == target
    assert [one.label for one in engines_of(search)] == [
        "fp32 on onnx", "int8 on ort_genai", "int4 by gptq on ort_genai", "int8 on onnx"
    ]  # fmt: skip
    assert search.alternative


def test_one_line_is_planned_from_a_text_and_a_time(
    cli: Any, tiny_llama: Path, notes: Path, tmp_path: Path
) -> None:
    asked = ["smaller", tiny_llama, "--by", "30%", "--data", notes, "--out", tmp_path / "out",
             "--store", tmp_path / "store", "--device", "cpu"]  # fmt: skip
    status, shown, said = cli(*asked, "--time", "1h", "--dry-run", "--json")
    assert status == 0, said
    planned = json.loads(shown)
    assert planned["recipe"] == "smaller-25"
    assert planned["stages"][0]["kind"] == "search"
    split, fitted = planned["notes"]
    assert "split by documents (evaluation 10%" in split
    assert "1 h 00 min" in fitted
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "store").exists()
    for wrong, told in (
        (["--time", "soon"], "write for example `30m`"),
        (["--by", "much"], "write for example `--by 25%`"),
        (["--runtime", "vllm"], "name one of them"),
    ):
        status, _, said = cli(*asked, *wrong, "--dry-run")
        assert status == 2
        assert told in said


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_run_and_plan_take_one_text(
    cli: Any, tiny_llama: Path, notes: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "deepest.yaml"
    judged = DEEPEST + "data: {e: {dataset: owner/name}}\n"
    recipe.write_text(judged.replace("generation: false", "quality: {perplexity: e}"))
    asked = [recipe, "-m", tiny_llama, "--data", notes, "--store", tmp_path / "store"]
    status, shown, said = cli("plan", *asked, "--json")
    assert status == 0, said
    assert "e 100%" in json.loads(shown)["notes"][0]
    status, _, said = cli("run", *asked, "-o", tmp_path / "out", "-q")
    assert status == 0, said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The text is split by documents" in card
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["e"]["part"] == {"start": 0.0, "stop": 1.0, "seed": 0}
    steps = [one["step"] for one in report["estimates"]]
    assert steps == ["import", "data", "prune: deepest", "verify"]
