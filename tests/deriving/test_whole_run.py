"""A model of a type without a table: planned, pruned, healed, exported, verified, in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prune_export import Machine, Options, Recipe, plan, run
from prune_export.arch import outside
from prune_export.arch.table import tables
from prune_export.checkpoint import Checkpoint
from prune_export.deriving.cache import ensure_family
from prune_export.errors import UnsupportedArch
from prune_export.execution.asked import config_of as opened_config

MODEL_TYPE = "biogpt"
"""The type of `tiny_other`."""

RECIPE = """
recipe: 1
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
  healing: {files: [healing.jsonl], samples: 16, length: 32}
stages:
  - prune: {method: angular_distance, sparsity: 0.25}
  - heal: {method: lora, rank: 2, steps: 5, batch: 4}
export:
  - onnx: {precision: fp32}
verify: {generation: false}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_a_derived_type_goes_all_the_way(tiny_other: Path, corpus: Path, tmp_path: Path) -> None:
    assert MODEL_TYPE not in tables()
    recipe = Recipe.parse(RECIPE, root=corpus)
    machine = Machine.detect(device="cpu", threads=1)
    options = Options(tmp_path / "out", tmp_path / "store", machine)
    planned = plan(recipe, str(tiny_other), options)
    assert planned.notes[0].startswith("No table is written for biogpt: one was derived")
    assert "Not proven, and refused: heads" in planned.notes[0]
    assert planned.archs[-1].layers == 6
    result = run(recipe, str(tiny_other), options)
    report = json.loads((result.out / "report.json").read_text())
    assert report["result"]["layers"] == 6
    assert not result.failed
    assert result.verification.reload.ok
    assert all(one.ok for one in result.verification.parity)
    assert "No table is written for biogpt" in (result.out / "README.md").read_text()


def test_a_kept_table_is_not_derived_again(
    tiny_other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    assert ensure_family(opened_config(tiny_other), store)
    assert Checkpoint.open(tiny_other).arch().family == "biogpt"
    monkeypatch.setenv(outside.VARIABLE, "")
    assert "biogpt" not in tables()

    def again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("prune_export.deriving.making.derive", again)
    assert ensure_family(opened_config(tiny_other), store)
    assert "biogpt" in tables()
    (artifact,) = store.glob("family-biogpt-*/manifest.json")
    checks = json.loads(artifact.read_text())["record"]["checks"]
    assert ["cache", "holds", "8 tokens"] in checks


def test_what_is_disproved_is_refused_with_the_way_on(
    tmp_path: Path, corpus: Path, config_of: object
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    full = config_of("diffllama", num_hidden_layers=6)  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(full))
    recipe = Recipe.parse(RECIPE, root=corpus)
    machine = Machine.detect(device="cpu", threads=1)
    with pytest.raises(UnsupportedArch, match="depth cut = blocks bypassed") as caught:
        plan(recipe, str(folder), Options(tmp_path / "out", tmp_path / "store", machine))
    assert "families derive" in caught.value.fix
    assert not list((tmp_path / "store").glob("family-*/manifest.json"))
