"""A plan says what will be refitted at the seams of a depth cut, and what that takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from prune_export import registry
from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.errors import PlanError
from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.planning.planned import PlannedStage
from prune_export.recipe import Recipe


def planned(
    root: Path, model: Path, tmp_path: Path, *, data: bool = True, **keys: Any
) -> PlannedStage:
    source = {"files": ["calibration.txt"], "samples": 8, "length": 16}
    asked = {"recipe": 1, "stages": [{"prune": keys}]}
    asked |= {"data": {"calibration": source}} if data else {}
    options = Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))
    made = plan(Recipe.parse(json.dumps(asked), root=root), str(model), options)
    return next(stage for stage in made.stages if stage.kind == "prune")


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"method": "deepest", "remove": 2}, "refits 1 seam, block 2"),
        ({"method": "deepest", "layers": [1, 3]}, "refits 2 seams, blocks 0, 2"),
        ({"method": "deepest", "layers": [0, 1]}, "no projection stands before what is removed"),
        ({"method": "every_other", "remove": 3}, "refits 3 seams, blocks 0, 2, 4"),
        ({"method": "angular_distance", "remove": 2}, "refits 1 seam"),
        ({"method": "block_influence", "remove": 2}, "refits up to 2 seams"),
        ({"method": "block_influence", "remove": 2, "contiguous": True}, "refits 1 seam"),
        ({"method": "block_influence", "layers": [2], "unit": "mlp"}, "refits 1 seam, block 2"),
        ({"method": "laco"}, "refits each seam"),
    ],
)
def test_a_plan_says_what_is_refitted(
    keys: dict[str, Any], note: str, tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    assert note in planned(corpus, tiny_llama, tmp_path, **keys).note


def test_a_refit_costs_a_pass(tiny_llama: Path, corpus: Path, tmp_path: Path) -> None:
    keys = {"method": "deepest", "remove": 2}
    with_it = planned(corpus, tiny_llama, tmp_path, **keys)
    without = planned(corpus, tiny_llama, tmp_path, **keys, refit=False)
    assert without.cost.flops == 0
    assert "refit" not in without.note
    assert with_it.cost.flops > 0
    assert with_it.cost.ram_bytes > without.cost.ram_bytes


def test_without_data_a_method_that_needs_none_goes_on(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    keys = {"method": "deepest", "remove": 2}
    stage = planned(corpus, tiny_llama, tmp_path, data=False, **keys)
    assert (stage.note, stage.cost.flops) == ("", 0)
    with pytest.raises(PlanError, match="defines no `calibration`, which deepest needs"):
        planned(corpus, tiny_llama, tmp_path, data=False, **keys, refit=True)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_a_family_that_norms_outputs_is_told(model_type: str) -> None:
    arch = Arch.from_config(
        AutoConfig.for_model(model_type, **table_for(model_type).tiny.config).to_dict()
    )
    method = registry.find("methods", "angular_distance")
    assert method(remove=2).refit_note(arch).startswith("no refit at the seams: ")
    assert method(remove=2).passes_with_data(arch) == ()
    with pytest.raises(PlanError, match="normalizes or turns"):
        method(remove=2, refit=True).passes_with_data(arch)
