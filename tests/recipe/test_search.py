"""The search stage: what it refuses, and the sizes that its candidates come to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import LlamaConfig

from prune_export.arch import Arch
from prune_export.errors import RecipeError
from prune_export.recipe import Recipe, templates

GOOD = """\
recipe: 1
data:
  calibration: {files: [a.txt], samples: 8, length: 64}
  ranking: {files: [b.txt], length: 64}
  healing: {files: [c.txt], length: 64}
stages:
  - search:
      target: {parameters: 0.75}
      candidates:
        - prune: {method: deepest, sparsity: to_target}
        - - prune: {method: block_influence, remove: 1}
          - prune: {method: angular_distance, sparsity: to_target}
      validation: ranking
      heal: {method: lora, steps: 5}
"""

BROKEN = {
    "two targets": ("{parameters: 0.75}", "{parameters: 0.75, speedup: 2}", "exactly one of"),
    "no target": ("{parameters: 0.75}", "{tolerance: 0.1}", "exactly one of"),
    "no mark": ("deepest, sparsity: to_target", "deepest, sparsity: 0.2", "0 times"),
    "two marks": ("block_influence, remove: 1", "block_influence, sparsity: to_target", "2 times"),
    "method": ("method: deepest", "method: deepst", "`deepst`"),
    "key": ("remove: 1}", "remov: 1}", "`remov` is not a key"),
    "data": ("validation: ranking", "validation: rankin", "'rankin', which `data` does not"),
    "healer": ("method: lora", "method: loraa", "`loraa`"),
    "engine": ("{parameters: 0.75}", "{speedup: 1.5, engine: onx}", "not an exporter"),
    "unknown key": (
        "      validation",
        "      validatoin: x\n      validation",
        "not a key of search",
    ),
    "heal inside": ("prune: {method: deepest", "heal: {method: lora", "`heal` is unknown here"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_search_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    before, after, problem = BROKEN[name]
    assert before in GOOD
    with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
        Recipe.parse(GOOD.replace(before, after, 1), root=tmp_path)
    assert re.search(r"recipe:\d+", str(caught.value))


def test_every_candidate_comes_as_near_as_it_can(tmp_path: Path) -> None:
    (stage,) = Recipe.parse(GOOD, root=tmp_path).stages
    assert stage.uses == ("ranking", "healing", "calibration")
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=12,
        vocab_size=50,
        intermediate_size=128,
        num_attention_heads=4,
    )
    arch = Arch.from_config(config.to_dict())
    wanted = round(0.75 * arch.parameters())
    one, two = (template.to_size(arch, wanted) for template in templates(stage.entry))
    assert one.arch.layers == two.arch.layers == 9
    assert two.label == "block_influence + angular_distance"
    nearest = min(
        range(1, 12), key=lambda left: abs(arch.without(range(left, 12)).parameters() - wanted)
    )
    assert one.arch.layers == nearest


def test_a_written_search_reads_back_the_same(tmp_path: Path) -> None:
    recipe = Recipe.parse(GOOD, root=tmp_path)
    again = Recipe.parse(recipe.to_yaml(), root=tmp_path)
    assert again.stages == recipe.stages
