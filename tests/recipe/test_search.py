"""The search stage: what it refuses, and the sizes that its candidates come to."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from prune_export.arch import Arch
from prune_export.errors import PlanError, RecipeError
from prune_export.recipe import Recipe, heal_of, rungs_of, templates
from prune_export.recipe.search import Target

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

GRID = (
    GOOD[: GOOD.index("      candidates")]
    + """\
      grid:
        depth: {method: deepest}
        width: {method: minitron, compensate: false}
        remove: [0, 2, 4]
        ffn: [0, 0.25, to_target]
        hidden: [0, 0.25]
      validation: ranking
"""
)

BROKEN_GRIDS = {
    "no method": ("        depth: {method: deepest}\n", "", "expected `depth` and amounts"),
    "no amounts": ("remove: [0, 2, 4]", "remove: [0]", "expected `depth` and amounts"),
    "no width": ("        width: {method: minitron, compensate: false}\n", "", "expected `width`"),
    "two marks": ("hidden: [0, 0.25]", "hidden: [0, to_target]", "in `ffn` and `hidden`"),
    "method": ("method: minitron", "method: minitorn", "`minitorn`"),
    "key": ("compensate: false", "compensat: false", "`compensat` is not a key"),
    "amount": ("hidden: [0, 0.25]", "hidden: [0, 1.25]", "less than 1"),
    "unknown key": ("hidden: [0, 0.25]", "hiden: [0, 0.25]", "`hiden` is not a key"),
    "nothing": (GRID[GRID.index("      grid") : GRID.index("      valid")], "", "to choose from"),
    "bytes": ("{parameters: 0.75}", "{bytes: many}", "is not a size"),
}

BROKEN = {
    "two targets": ("{parameters: 0.75}", "{parameters: 0.75, speedup: 2}", "exactly one of"),
    "no target": ("{parameters: 0.75}", "{tolerance: 0.1}", "exactly one of"),
    "no mark": ("deepest, sparsity: to_target", "deepest, sparsity: 0.2", "0 times"),
    "two marks": ("block_influence, remove: 1", "block_influence, sparsity: to_target", "2 times"),
    "mark of a number": (
        "deepest, sparsity: to_target",
        "deepest, remove: to_target",
        "a fraction",
    ),
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


@pytest.mark.parametrize("name", BROKEN_GRIDS)
def test_a_malformed_grid_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    before, after, problem = BROKEN_GRIDS[name]
    assert before in GRID
    with pytest.raises(RecipeError, match=re.escape(problem)) as caught:
        Recipe.parse(GRID.replace(before, after, 1), root=tmp_path)
    assert re.search(r"recipe:\d+", str(caught.value))


def amounts(count: int, largest: float) -> str:
    return str([round(largest * i / count, 6) for i in range(count)])


@pytest.mark.parametrize(
    ("count", "told"), [(8, "32,768 candidates"), (1500, "candidates (1500 x")]
)
def test_a_grid_of_too_many_is_counted_not_made(count: int, told: str, tmp_path: Path) -> None:
    """Five lists of eight are 32,768 models; making them took minutes before anything was said."""
    lists = "".join(
        f"        {name}: {amounts(count, 0.5)}\n"
        for name in ("ffn", "heads", "kv_groups", "hidden")
    )
    text = GRID[: GRID.index("        remove")] + f"        remove: {list(range(count))}\n" + lists
    with pytest.raises(RecipeError, match=re.escape(told)) as caught:
        Recipe.parse(text + "      validation: ranking\n", root=tmp_path)
    assert re.match(r"recipe:9  stages\.0\.search\.grid", caught.value.where)
    assert "expected at most 1,000" in caught.value.problem
    assert "fewer amounts" in caught.value.fix


def test_too_many_listed_candidates_and_requests_are_counted(tmp_path: Path) -> None:
    one = "        - prune: {method: deepest, sparsity: to_target}\n"
    with pytest.raises(RecipeError, match=r"makes 1,102 candidates, expected at most 1,000"):
        Recipe.parse(GOOD.replace(one, one * 1101), root=tmp_path)
    sweep = {"batch": list(range(1, 101)), "prompt": list(range(1, 101))}
    with pytest.raises(RecipeError, match=r"makes 10,000 requests, expected at most 1,000"):
        Recipe.parse(
            f"recipe: 1\nexport: [onnx]\nverify: {{speed: {{sweep: {sweep}}}}}\n", root=tmp_path
        )


def test_what_is_left_out_of_a_grid_unsolved_could_not_have_come_to_the_target(
    tmp_path: Path,
) -> None:
    (stage,) = Recipe.parse(GRID, root=tmp_path).stages
    arch = small_arch()
    for left in (0.5, 0.75, 0.9):
        fitting, wanted = [], left * arch.parameters()
        for template in templates(stage.entry):
            off = template.to_size(arch, round(wanted)).arch.parameters() / wanted - 1
            fitting += [template.label] if abs(off) <= 0.05 else []
        found = []
        for template in templates(stage.entry):
            with suppress(PlanError):
                template.near(arch, left, 0.05)
                found.append(template.label)
        assert found == fitting


def small_arch() -> Arch:
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=12,
        vocab_size=50,
        intermediate_size=128,
        num_attention_heads=4,
    )
    return Arch.from_config(config.to_dict())


def test_a_grid_is_every_combination_that_removes_something(tmp_path: Path) -> None:
    (stage,) = Recipe.parse(GRID, root=tmp_path).stages
    found = list(templates(stage.entry))
    assert len(found) == 3 * 3 * 2 - 1
    assert found[0].label == "minitron hidden 0.25"
    assert found[-1].label == "deepest remove 4 + minitron ffn hidden 0.25"
    assert stage.uses == ("ranking", "calibration")
    arch = small_arch()
    fixed = next(one for one in found if one.label == "deepest remove 2 + minitron ffn 0.25")
    assert fixed.fixed
    made = fixed.to_size(arch, 1)
    assert (made.arch.layers, made.arch.sizes["mlp.0"]) == (10, 96)
    solved = next(one for one in found if one.label == "deepest remove 2 + minitron ffn")
    wanted = round(0.75 * arch.parameters())
    made = solved.to_size(arch, wanted)
    assert abs(made.arch.parameters() / wanted - 1) < 0.05
    assert re.fullmatch(r"deepest remove 2 \+ minitron ffn 0\.\d+", made.label)


def test_a_heal_in_rungs_is_the_whole_heal(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 5", "steps: 100")
    healer = heal_of(Recipe.parse(text, root=tmp_path).stages[0].entry)
    assert healer is not None
    assert [rung.entry.steps for rung in rungs_of(healer, 3)] == [25, 25, 50]
    assert [rung.entry.steps for rung in rungs_of(healer, 1)] == [100]
    few = replace(healer, entry=replace(healer.entry, steps=2))
    assert [rung.entry.steps for rung in rungs_of(few, 4)] == [1, 1]


def test_bytes_are_a_fraction_of_the_base() -> None:
    assert Target(bytes="150MB").fraction(200_000_000) == 0.75
    assert Target(speedup=1.5).fraction(200_000_000) is None
    with pytest.raises(PlanError, match="base has 100 bytes"):
        Target(bytes="150MB").fraction(100)


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
    arch = small_arch()
    wanted = round(0.75 * arch.parameters())
    one, two = (template.to_size(arch, wanted) for template in templates(stage.entry))
    assert one.arch.layers == two.arch.layers == 9
    assert two.label == "block_influence remove 1 + angular_distance"
    nearest = min(
        range(1, 12), key=lambda left: abs(arch.without(range(left, 12)).parameters() - wanted)
    )
    assert one.arch.layers == nearest


@pytest.mark.parametrize(
    "cut",
    [
        "block_influence, unit: attention, sparsity: to_target",
        "llm_pruner, ffn: to_target, per_layer: true",
    ],
)
def test_what_only_leaves_zeros_has_no_size(cut: str, tmp_path: Path) -> None:
    """Engines of its shapes would be as slow as the dense one, and count as what was asked for."""
    text = GOOD.replace("deepest, sparsity: to_target", cut)
    (stage,) = Recipe.parse(text, root=tmp_path).stages
    one, _ = templates(stage.entry)
    with pytest.raises(PlanError, match="leaves every shape as it is"):
        one.to_size(small_arch(), 1)


def test_a_written_search_reads_back_the_same(tmp_path: Path) -> None:
    recipe = Recipe.parse(GOOD, root=tmp_path)
    again = Recipe.parse(recipe.to_yaml(), root=tmp_path)
    assert again.stages == recipe.stages
    recipe = Recipe.parse(GRID, root=tmp_path)
    assert Recipe.parse(recipe.to_yaml(), root=tmp_path).stages == recipe.stages
