"""`iterate`: rounds written out as stages, and what cannot be shared out."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from prune_export.errors import RecipeError
from prune_export.recipe import Recipe
from prune_export.recipe.reference import json_schema

TEXT = """\
recipe: 1
data:
  calibration: {files: [a.txt], samples: 4, length: 16}
  healing: {files: [a.txt], samples: 4, length: 16}
stages:
  - prune: {method: deepest, remove: 1}
  - iterate:
      rounds: 3
      stages:
        - prune: {PRUNE}
        - heal: {method: lora, HEAL}
  - iterate: {rounds: 2, stages: [{prune: {method: magnitude, sparsity: 0.5}}]}
"""


def parsed(prune: str, heal: str = "steps: 5") -> Recipe:
    return Recipe.parse(TEXT.replace("PRUNE", prune).replace("HEAL", heal), name="recipe")


def values(recipe: Recipe, kind: str, key: str) -> list[Any]:
    inner = recipe.stages[1:7]
    return [getattr(stage.entry, key) for stage in inner if stage.kind == kind]


@pytest.mark.parametrize(
    ("prune", "key", "expected"),
    [
        ("method: block_influence, remove: 6", "remove", [2, 2, 2]),
        ("method: block_influence, remove: 7", "remove", [3, 2, 2]),
        ("method: block_influence, remove: [3, 1, 2]", "remove", [3, 1, 2]),
        # Equal steps of the dense model: 10 %, then a ninth and an eighth of what is left.
        ("method: deepest, sparsity: 0.3", "sparsity", [0.1, 1 / 9, 1 / 8]),
        ("method: minitron, ffn: 0.3", "ffn", [0.1, 1 / 9, 1 / 8]),
        ("method: every_other, sparsity: [0.5, 0.5, 0.4]", "sparsity", [0.5, 0.5, 0.4]),
        # The shapes stay, so each is a fraction of as many; and zeros are found again.
        ("method: block_influence, unit: mlp, sparsity: 0.3", "sparsity", [0.1, 0.1, 0.1]),
        ("method: wanda, sparsity: 0.6", "sparsity", [0.2, 0.4, 0.6]),
    ],
)
def test_what_is_removed_is_shared_out(prune: str, key: str, expected: list[float]) -> None:
    recipe = parsed(prune)
    assert values(recipe, "prune", key) == pytest.approx(expected, abs=1e-8)
    # Written out it is the same recipe, and one of the schema.
    again = Recipe.parse(recipe.to_yaml())
    assert again.stages == recipe.stages
    assert again.to_yaml() == recipe.to_yaml()
    data = yaml.safe_load(recipe.to_yaml())
    jsonschema.Draft202012Validator(json_schema()).validate(data)
    assert [list(stage) for stage in data["stages"]] == [["prune"], ["iterate"], ["iterate"]]


def test_stages_say_their_round() -> None:
    titles = [stage.title for stage in parsed("method: block_influence, remove: 3").stages]
    assert titles[:4] == [
        "deepest", "block_influence, round 1 of 3", "lora, round 1 of 3",
        "block_influence, round 2 of 3",
    ]  # fmt: skip
    assert titles[-1] == "magnitude, round 2 of 2"


def test_each_round_heals_with_other_windows_and_may_be_told_how() -> None:
    assert values(parsed("method: deepest, remove: 3"), "heal", "seed") == [0, 1, 2]
    assert values(parsed("method: deepest, remove: 3", "seed: 7"), "heal", "seed") == [7, 8, 9]
    told = parsed("method: deepest, remove: 3", "steps: [5, 10, 20], seed: [4, 4, 4]")
    assert values(told, "heal", "steps") == [5, 10, 20]
    assert values(told, "heal", "seed") == [4, 4, 4]
    assert Recipe.parse(told.to_yaml()).stages == told.stages


@pytest.mark.parametrize(
    ("prune", "key", "problem", "fix"),
    [
        ("method: deepest, remove: 2", "prune.remove", "remove nothing", "at least 3"),
        (
            "method: deepest, remove: [1, 1]",
            "prune.remove",
            "2 values for 3 rounds",
            "one for each",
        ),
        ("method: deepest, layers: [1]", "prune.layers", "others have these", "without `iterate`"),
        ("method: wanda, nm: {keep: 2, of: 4}", "prune.nm", "no steps", "without `iterate`"),
        ("method: ziplm, target: {speedup: 2}", "prune.target", "first round", "without"),
        ("method: deepest, sparsity: 40", "prune.sparsity", "got 40", "0.4"),
        ("method: deepst, remove: 3", "prune.method", "deepst", "deepest"),
        ("method: lora, rank: [1, 2, 3], remove: 3", "prune.method", "lora", ""),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(
    prune: str, key: str, problem: str, fix: str
) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        parsed(prune)
    assert caught.value.where == f"recipe:10  stages.1.iterate.stages.0.{key}"
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("[{iterate: {rounds: 1, stages: [{prune: {method: deepest, remove: 1}}]}}]", "got 1"),
        ("[{iterate: {rounds: 2, stages: [{heal: {method: lora}}]}}]", "no `prune`"),
        ("[{iterate: {rounds: 2, stages: []}}]", "at least 1"),
        ("[{iterate: {rounds: 2, stages: [{search: {}}, {prune: {}}]}}]", "`search` is unknown"),
        ("[{iterate: {stages: [{prune: {}}]}}]", "no `rounds`"),
        ("[{iterate: 3}]", "expected keys"),
        ("[{iterate: {rounds: 2, times: 3, stages: [{prune: {}}]}}]", "`times` is not a key"),
    ],
)
def test_rounds_that_are_none_are_refused(stages: str, problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        Recipe.parse(f"recipe: 1\nstages: {stages}")
