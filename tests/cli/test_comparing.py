"""`compare`: several models at once, measured against the first one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

Call = Any


@pytest.fixture
def shorter(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny model without its last blocks, as a checkpoint beside it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    folder = tmp_path / "shorter"
    model.save_pretrained(folder)
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_three_models_in_one_table(
    cli: Call, tiny_llama: Path, shorter: Path, tmp_path: Path
) -> None:
    third = tmp_path / "third"
    shutil.copytree(shorter, third)
    asked = ("compare", tiny_llama, shorter, third, "--no-speed", "--store", tmp_path / "store")
    status, shown, said = cli(*asked, "--json")
    assert status == 0, said
    found = json.loads(shown)
    assert [one["label"] for one in found["entries"]] == ["tiny-llama", "shorter", "third"]
    first, second, last = found["entries"]
    assert first["decode"] is None
    assert last["bytes"] == second["bytes"] < first["bytes"]
    assert [one["beaten_by"] for one in found["entries"]] == ["shorter", None, None]
    assert "note: without `--data` no quality was measured" in cli(*asked)[1]


@pytest.mark.usefixtures("measured_here")
def test_the_quality_of_each_is_measured_on_the_same_windows(
    cli: Call, tiny_llama: Path, shorter: Path, corpus: Path, tmp_path: Path
) -> None:
    status, shown, said = cli(
        "compare", tiny_llama, shorter, "--data", corpus / "evaluation.txt", "--no-speed",
        "--store", tmp_path / "store", "--json", "--out", tmp_path / "compared",
    )  # fmt: skip
    assert status == 0, said
    first, second = json.loads(shown)["entries"]
    assert len(first["perplexity"]["losses"]) == len(second["perplexity"]["losses"])
    assert first["perplexity"]["value"] != second["perplexity"]["value"]
    assert {path.name for path in (tmp_path / "compared").iterdir()} == {
        "comparison.html", "comparison.png",
    }  # fmt: skip


def test_another_tokenizer_is_refused_before_anything_is_measured(
    cli: Call, tiny_llama: Path, shorter: Path, corpus: Path, tmp_path: Path
) -> None:
    raw = json.loads((shorter / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = raw["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (shorter / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    status, _, said = cli(
        "compare", tiny_llama, shorter, "--data", corpus / "evaluation.txt",
        "--store", tmp_path / "store",
    )  # fmt: skip
    assert status == 2
    assert "makes other tokens of this text" in said


def test_what_a_directory_does_not_hold_is_named(cli: Call, tiny_llama: Path) -> None:
    status, _, said = cli("compare", tiny_llama, tiny_llama, "--engine", "onnx")
    assert status == 2
    assert "holds no engines" in said
    status, _, said = cli("compare", tiny_llama)
    assert status == 2
    assert "name a second directory" in said
