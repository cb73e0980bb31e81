"""The command `families`: lists, shows, derives, proves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prune_export.arch import outside
from prune_export.arch.table import parse_table, tables
from prune_export.deriving.instances import config_class, quietly


@pytest.fixture(autouse=True)
def no_tables_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(outside.VARIABLE, "")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory that is only a config.json, of a type that has no table."""
    with quietly():
        full = config_class("iquestcoder")(num_hidden_layers=6, vocab_size=640).to_dict()
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(full))
    return folder


def test_all_families_are_listed(cli: Any, tmp_path: Path) -> None:
    status, shown, _ = cli("families", "--json", "--store", tmp_path / "none")
    assert status == 0
    assert {one["family"] for one in json.loads(shown)} == {
        table.family for table in tables().values()
    }


def test_the_facts_of_one(cli: Any, tmp_path: Path) -> None:
    where = ("--json", "--store", tmp_path / "none")
    facts = json.loads(cli("families", "qwen3_moe", *where)[1])
    assert facts["width"] == ("MLP width, width of experts, number of experts, heads, hidden size")
    assert facts["depth"].startswith("blocks of each kind")
    facts = json.loads(cli("families", "gpt2", *where)[1])
    assert "heads" not in facts["width"]
    assert json.loads(cli("families", "gptj", *where)[1])["graphs (onnx, tensorrt, aoti)"][:7] == (
        "refused"
    )
    hybrid = json.loads(cli("families", "lfm2", *where)[1])["graphs (onnx, tensorrt, aoti)"]
    assert hybrid.startswith("onnx; the others refuse")
    status, _, error = cli("families", "qwen33", *where[1:])
    assert status == 2
    assert "did you mean" in error


def test_derive_writes_a_table_that_prove_takes_and_plan_uses(
    cli: Any, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine" / "coder.yaml"
    status, shown, _ = cli("families", "derive", model, "-o", file)
    assert status == 0
    assert "depth cut = blocks bypassed" in shown
    table = parse_table(file.read_text(), str(file))
    assert table.derived is None
    assert table.source.startswith("derived by prune_export")
    assert cli("families", "derive", model, "-o", file)[0] == 2
    status, shown, _ = cli("families", "prove", file, "--json")
    assert status == 0
    assert {one["came"] for one in json.loads(shown)["checks"]} == {"holds"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("recipe: 1\nstages:\n  - prune: {method: deepest, remove: 2}\n")
    asked = ("plan", recipe, "-m", model, "--store", tmp_path / "store", "--json")
    status, shown, _ = cli(*asked, "--families", file.parent)
    assert status == 0
    planned = json.loads(shown)
    assert planned["family"] == "iquestcoder"
    assert not any("No table is written" in note for note in planned["notes"])
    assert not (tmp_path / "store").exists()


def test_a_wrong_table_is_disproved_with_status_1(cli: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "coder.yaml"
    cli("families", "derive", model, "-o", file)
    text = file.read_text()
    old = "{name: self_attn.q_proj.weight, role: q, dims: (kv group dim) residual}"
    assert old in text
    file.write_text(text.replace(old, old.replace("kv group dim", "group kv dim")))
    status, _, error = cli("families", "prove", file)
    assert status == 1
    assert error.splitlines()[0].endswith("iquestcoder  heads")
    file.write_text(text.replace("role: down", "role: [down"))
    assert cli("families", "prove", file)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("derive",), "is given no MODEL"),
        (("prove",), "is given no FILE or MODEL"),
        (("prove", "missing.yaml"), "no such file"),
        (("llama", "more"), "takes nothing more"),
        (("derive", "m", "-o", "table.json"), "is no .yaml file"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    cli: Any, arguments: tuple[str, ...], problem: str
) -> None:
    status, _, error = cli("families", *arguments)
    assert status == 2
    assert problem in error
