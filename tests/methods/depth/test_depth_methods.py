"""The depth methods on statistics made by hand: what they drop is known beforehand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import exp, log
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from prune_export import registry
from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    ModelView,
    SkipLoss,
    SkipLosses,
)
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Decision
from prune_export.errors import PlanError, RecipeError
from prune_export.methods.depth.angular_distance import AngularDistanceDrop
from prune_export.methods.depth.block_influence import BlockInfluenceDrop
from prune_export.methods.depth.deepest import Deepest
from prune_export.methods.depth.perplexity import Perplexity
from prune_export.recipe import Recipe
from prune_export.surgery import Drop
from tests.arch.tiny_models import arch_of

DEPTH = ("angular_distance", "block_influence", "deepest", "perplexity")


def decided(method: Any, layers: int, results: Mapping[Any, Any] | None = None) -> Decision:
    # The checkpoint is never opened: depth methods read no weights.
    nothing = Checkpoint(path=None, config={}, entries={})  # type: ignore[arg-type]
    return method.decide(
        ModelView(arch_of("llama", num_hidden_layers=layers), nothing, results or {})
    )


def dropped(decision: Decision) -> list[int]:
    assert list(decision.edits) == [Drop(tuple(decision.log["dropped"]))]
    return decision.log["dropped"]


def distances(layers: int, near: Mapping[tuple[int, int], float]) -> torch.Tensor:
    """A map in which all is far (0.5) but the pairs given."""
    table = torch.full((layers + 1, layers + 1), 0.5, dtype=torch.float64)
    for (start, stop), distance in near.items():
        table[start, stop] = table[stop, start] = distance
    return table


def test_angular_distance_takes_the_least_run() -> None:
    results = {AngularDistance(): distances(8, {(3, 6): 0.1, (1, 4): 0.125, (2, 4): 0.01})}
    found = decided(AngularDistanceDrop(remove=3), 8, results)
    assert dropped(found) == [3, 4, 5]
    assert found.log["kept"] == [0, 1, 2, 6, 7]
    assert found.log["score"] == 0.1
    assert found.log["runner_up"] == [1, 2, 3]
    assert found.log["margin"] == pytest.approx(0.025)
    assert found.log["distance_map"][3][6] == 0.1
    assert len(found.log["block_scores"]) == 8


def test_angular_distance_may_take_the_first_and_the_last_block() -> None:
    first = {AngularDistance(): distances(6, {(0, 2): 0.1})}
    last = {AngularDistance(): distances(6, {(4, 6): 0.1})}
    assert dropped(decided(AngularDistanceDrop(remove=2), 6, first)) == [0, 1]
    assert dropped(decided(AngularDistanceDrop(remove=2), 6, last)) == [4, 5]


def test_of_equal_runs_the_deepest_goes() -> None:
    results = {AngularDistance(): distances(6, {(1, 3): 0.1, (3, 5): 0.1})}
    found = decided(AngularDistanceDrop(remove=2), 6, results)
    assert dropped(found) == [3, 4]
    assert found.log["margin"] == 0


@pytest.mark.parametrize(
    ("layers", "remove", "expected"),
    [(8, 1, [6]), (8, 3, [4, 5, 6]), (8, 7, [0, 1, 2, 3, 4, 5, 6]), (2, 1, [0])],
)
def test_deepest_keeps_the_last_block(layers: int, remove: int, expected: list[int]) -> None:
    assert dropped(decided(Deepest(remove=remove), layers)) == expected


def test_block_influence_takes_the_lowest_blocks_or_the_lowest_run() -> None:
    results = {BlockInfluence(): torch.tensor([9.0, 1.0, 5.0, 2.0, 2.5, 8.0])}
    found = decided(BlockInfluenceDrop(remove=2), 6, results)
    assert dropped(found) == [1, 3]
    assert found.log["order"] == [1, 3, 4, 2, 5, 0]
    assert (found.log["runner_up"], found.log["margin"]) == ([4], 0.5)
    run = decided(BlockInfluenceDrop(remove=2, contiguous=True), 6, results)
    assert dropped(run) == [3, 4]
    assert run.log["score"] == 4.5
    assert (run.log["runner_up"], run.log["margin"]) == ([1, 2], 1.5)


def test_perplexity_takes_the_blocks_that_are_missed_least() -> None:
    method = Perplexity(remove=2, protect_first=1, protect_last=1, samples=3, length=9)
    losses = {1: log(30), 2: log(11), 3: log(20), 4: log(12)}
    (statistic,) = method.statistics(arch_of("llama", num_hidden_layers=6))
    assert statistic == SkipLoss((1, 2, 3, 4), 3, 9)
    results = {statistic: SkipLosses(log(10), losses)}
    found = decided(method, 6, results)
    assert dropped(found) == [2, 4]
    assert found.log["order"] == [2, 4, 3, 1]
    assert found.log["dense_perplexity"] == pytest.approx(10)
    assert found.log["block_scores"] == [None, *map(exp, losses.values()), None]
    run = decided(dataclasses.replace(method, contiguous=True), 6, results)
    assert dropped(run) == [2, 3]


def test_perplexity_protects_four_and_two_by_default() -> None:
    (statistic,) = Perplexity(remove=1).statistics(arch_of("llama", num_hidden_layers=12))
    assert statistic == SkipLoss(tuple(range(4, 10)), 10, 128)


@pytest.mark.parametrize(("layers", "remove"), [(6, 1), (4, 1), (2, 1), (12, 7)])
def test_protecting_too_much_is_refused(layers: int, remove: int) -> None:
    for ask in (Perplexity(remove=remove).predict, Perplexity(remove=remove).statistics):
        with pytest.raises(PlanError, match=f"of {layers} blocks to choose from"):
            ask(arch_of("llama", num_hidden_layers=layers))


@pytest.mark.parametrize("name", DEPTH)
def test_listed_blocks_need_no_data(name: str) -> None:
    method = registry.find("methods", name)(layers=(4, 1))
    assert method.statistics(arch_of("llama", num_hidden_layers=6)) == ()
    assert method.predict(arch_of("llama", num_hidden_layers=6)).layers == 4
    found = decided(method, 6)
    assert dropped(found) == [1, 4]
    assert found.log["kept"] == [0, 2, 3, 5]


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize(
    ("sparsity", "layers", "left"),
    [(0.4, 30, 18), (0.2, 30, 24), (0.25, 30, 22), (0.35, 30, 19), (0.01, 12, 11), (0.5, 31, 15)],
)
def test_sparsity_is_rounded_half_up_and_removes_at_least_one(
    name: str, sparsity: float, layers: int, left: int
) -> None:
    method = registry.find("methods", name)(sparsity=sparsity)
    assert method.predict(arch_of("llama", num_hidden_layers=layers)).layers == left


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize(
    "amount", [{"remove": 6}, {"remove": 7}, {"sparsity": 0.99}, {"layers": (0, 1, 2, 3, 4, 5)}]
)
def test_removing_all_is_refused(name: str, amount: dict[str, Any]) -> None:
    protect = {"protect_first": 0, "protect_last": 0} if name == "perplexity" else {}
    with pytest.raises(PlanError, match=r"of 6 blocks would be removed|all 6 blocks would be"):
        registry.find("methods", name)(**amount, **protect).predict(
            arch_of("llama", num_hidden_layers=6)
        )


@pytest.mark.parametrize("name", DEPTH)
def test_a_block_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=r"got \[6\], but the model has layers 0 to 5"):
        method = registry.find("methods", name)(layers=(6,))
        method.predict(arch_of("llama", num_hidden_layers=6))


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({}, "got nothing"),
        ({"sparsity": 0.1, "remove": 2}, "got `sparsity` and `remove`"),
        ({"remove": 2, "layers": (1,)}, "got `remove` and `layers`"),
        ({"layers": (1, 3, 1)}, r"lists \[1\] twice"),
    ],
)
def test_how_many_must_be_said_once(name: str, amount: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        registry.find("methods", name)(**amount)


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize(
    "amount",
    [
        {"sparsity": 0},
        {"sparsity": 1.0},
        {"sparsity": -0.1},
        {"remove": 0},
        {"layers": []},
        {"layers": [-1]},
    ],
)
def test_values_out_of_bounds_are_refused_by_the_schema(name: str, amount: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(registry.find("methods", name)).validate_python(amount)


@pytest.mark.parametrize("name", DEPTH)
def test_a_recipe_error_names_the_line(name: str) -> None:
    text = f"recipe: 1\nstages:\n  - prune: {{method: {name}, sparsity: 60}}\n"
    with pytest.raises(RecipeError, match=r"recipe:3 .*sparsity") as error:
        Recipe.parse(text)
    assert "60" in error.value.problem


@pytest.mark.parametrize("model_type", ["gemma3_text", "qwen2", "qwen3_moe"])
def test_predicted_shapes_are_those_of_a_cut_model(model_type: str) -> None:
    arch = arch_of(model_type, num_hidden_layers=6)
    after = AngularDistanceDrop(remove=2).predict(arch)
    assert (after.layers, after.config["num_hidden_layers"]) == (4, 4)
    assert after == arch.without((3, 4))
