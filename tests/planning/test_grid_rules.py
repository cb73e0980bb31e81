"""What a plan refuses of recipes that quantize."""

from __future__ import annotations

import pytest

from prune_export.errors import PlanError
from prune_export.planning.grid_rules import refuse_lost_grids
from prune_export.recipe import Recipe

DATA = "data: {calibration: {files: [a.txt]}, healing: {files: [b.txt]}}\n"


def recipe(text: str) -> Recipe:
    return Recipe.parse(f"recipe: 1\n{DATA}{text}")


def test_quantizing_comes_last() -> None:
    stages = "stages:\n- quantize: {method: gptq}\n- heal: {method: lora}\n"
    with pytest.raises(PlanError, match="would move weights off their grid"):
        refuse_lost_grids(recipe(stages))
    refuse_lost_grids(recipe("stages:\n- heal: {method: lora}\n- quantize: {method: gptq}\n"))
    refuse_lost_grids(recipe("stages:\n- heal: {method: lora}\n"))


@pytest.mark.parametrize("exporter", ["onnx", "ort_genai"])
def test_engines_have_the_bits_of_the_grid(exporter: str) -> None:
    stages = "stages:\n- quantize: {method: rtn}\n"
    with pytest.raises(PlanError, match=r"precision\s+is int8, and rtn puts weights on grids of 4"):
        refuse_lost_grids(recipe(f"{stages}export:\n- {exporter}: {{precision: int8}}\n"))
    for fine in ("int4", "fp32"):
        refuse_lost_grids(recipe(f"{stages}export:\n- {exporter}: {{precision: {fine}}}\n"))


def test_keys_that_came_later_leave_ids_as_they_were() -> None:
    (plain, same, other) = recipe(
        "stages: []\nexport:\n- onnx: {precision: int8}\n- ort_genai: {head: same}\n- aoti\n"
    ).export
    assert "block_size" not in plain.parameters()
    assert "head" not in same.parameters()
    assert other.parameters()
    (changed,) = recipe("stages: []\nexport:\n- ort_genai: {head: int8}\n").export
    assert changed.parameters()["head"] == "int8"
