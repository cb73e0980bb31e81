"""Greedy removal: the race and the beam by hand, the whole of it against brute force."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.arch.table import tables
from prune_export.calibrate import ExtraPass, Unit
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.methods.depth.greedy_loss import GreedyLoss
from prune_export.pruning.depth.greedy import greedy
from prune_export.surgery import Drop, Overwrite, rewrite
from tests.arch.kinds import HALF_BLOCKS
from tests.views import random_view

MACHINE = Machine("cpu", 8 << 30, 0, 1)


@dataclass
class Told:
    """Losses by the layers removed, and by chunk where they differ; it counts what is asked."""

    by: Callable[[frozenset[int], int], float]
    chunks: int = 1
    asked: list[tuple[frozenset[int], int]] = field(default_factory=list)

    def losses(
        self,
        models: Sequence[Collection[Unit]],
        *,
        chunks: int | None = None,
        keep: Iterable[Collection[Unit]] = (),
    ) -> list[float]:
        del keep
        count = chunks or self.chunks
        found = []
        for model in models:
            layers = frozenset(unit.layer for unit in model)
            new = [(layers, chunk) for chunk in range(count) if (layers, chunk) not in self.asked]
            self.asked += new
            found.append(sum(self.by(layers, chunk) for chunk in range(count)) / count)
        return found


def units(count: int) -> list[Unit]:
    return [Unit(layer) for layer in range(count)]


def test_a_pair_that_does_the_same_work_twice_loses_only_one() -> None:
    """Blocks 1 and 2 each are nearly idle, but not both: what a one-shot score cannot see."""
    costs = {0: 5.0, 1: 0.1, 2: 0.11, 3: 1.0}

    def loss(gone: frozenset[int], chunk: int) -> float:
        del chunk
        return 2.0 + sum(costs[layer] for layer in gone) + (9.0 if {1, 2} <= gone else 0.0)

    found = greedy(Told(loss), units(4), 2, shortlist=4)  # type: ignore[arg-type]
    assert [unit.layer for unit in found.order] == [1, 3]
    assert [loss for loss, _ in found.best] == pytest.approx([2.0, 2.1, 3.1])
    assert {unit.layer: cost for unit, cost in found.first_costs.items()} == pytest.approx(costs)
    first, second = found.steps
    assert (first["removed"], first["runner_up"], first["measured"]) == (1, 2, 4)
    assert first["increase"] == pytest.approx(0.1)
    assert first["margin"] == pytest.approx(0.01)
    assert (second["removed"], second["measured"]) == (3, 3)
    assert second["increase"] == pytest.approx(1.0)


def test_a_shortlist_measures_only_what_was_cheap_before() -> None:
    costs = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    told = Told(lambda gone, _: sum(costs[layer] for layer in gone))
    found = greedy(told, units(6), 3, shortlist=2)  # type: ignore[arg-type]
    assert [unit.layer for unit in found.order] == [0, 1, 2]
    assert [step["measured"] for step in found.steps] == [6, 2, 2]
    second = {layers - {0} for layers, _ in told.asked if 0 in layers and len(layers) == 2}
    assert second == {frozenset({1}), frozenset({2})}


def test_racers_that_do_badly_on_few_windows_leave() -> None:
    """Of 8 racers 4 go on after one chunk, 2 after two; the rest decide on all four."""
    first = {layer: 1.0 + 0.01 * layer for layer in range(8)}

    def loss(gone: frozenset[int], chunk: int) -> float:
        (layer,) = gone or {-1}
        if layer < 0:
            return 1.0
        # On the last two chunks block 1 is better than block 0.
        return first[layer] - (0.5 if layer == 1 and chunk > 1 else 0.0)

    told = Told(loss, chunks=4)
    found = greedy(told, units(8), 1, shortlist=8)  # type: ignore[arg-type]
    assert [unit.layer for unit in found.order] == [1]
    seen = [sum(layers == {layer} for layers, _ in told.asked) for layer in range(8)]
    assert seen == [4, 4, 2, 2, 1, 1, 1, 1]


def test_of_equal_losses_the_deepest_goes() -> None:
    found = greedy(Told(lambda gone, _: len(gone)), units(5), 2, shortlist=5)  # type: ignore[arg-type]
    assert [unit.layer for unit in found.order] == [4, 3]


def test_a_beam_finds_what_the_best_first_step_misses() -> None:
    """0 is the cheapest alone, but only 1 and 2 are cheap together."""
    table = {(0,): 1.0, (1,): 1.1, (2,): 1.2, (0, 1): 9.0, (0, 2): 8.0, (1, 2): 2.0}
    told = Told(lambda gone, _: table.get(tuple(sorted(gone)), 0.0))
    assert greedy(told, units(3), 2, shortlist=3).best[-1][0] == 8.0  # type: ignore[arg-type]
    found = greedy(told, units(3), 2, shortlist=3, beam=2)  # type: ignore[arg-type]
    assert {unit.layer for unit in found.order} == {1, 2}
    assert [loss for loss, _ in found.best] == [0.0, 1.0, 2.0]
    assert [step["gone"] for step in found.steps] == [[0], [1, 2]]


def test_an_early_choice_is_revised() -> None:
    """0 goes first, but 1 and 2 are the better pair, and without them 3 costs little."""
    alone = {0: 1.0, 1: 1.1, 2: 1.2, 3: 3.0}

    def loss(gone: frozenset[int], chunk: int) -> float:
        del chunk
        pair = 0.5 if {1, 2} <= gone else 0.0
        three = 2.5 if {1, 2, 3} <= gone else 0.0
        return sum(alone[layer] for layer in gone) - pair - three

    plain = greedy(Told(loss), units(4), 3, shortlist=4, revise=False)  # type: ignore[arg-type]
    assert sorted(unit.layer for unit in plain.order) == [0, 1, 2]
    found = greedy(Told(loss), units(4), 3, shortlist=4)  # type: ignore[arg-type]
    assert sorted(unit.layer for unit in found.order) == [1, 2, 3]
    assert [next(iter(step.items())) for step in found.steps] == [
        ("removed", 0),
        ("removed", 1),
        ("removed", 2),
        ("restored", 0),
        ("removed", 3),
    ]
    assert [loss for loss, _ in found.best] == pytest.approx([0.0, 1.0, 1.8, 2.3])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_it_equals_brute_force(model_type: str, tmp_path: Path) -> None:
    tiny, model = random_view(tmp_path, model_type, windows=1)
    ids = model.calibration().tokens.ids
    blocks = tiny.model.get_submodule(tiny.arch.table.blocks)

    def loss(gone: Collection[int]) -> float:
        def unchanged(_module: object, inputs: Any, output: Any) -> Any:
            return (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]

        hooks = [blocks[layer].register_forward_hook(unchanged) for layer in gone]
        with torch.no_grad():
            logits = tiny.model.float()(ids, use_cache=False).logits[0, :-1]
        for hook in hooks:
            hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    order: list[int] = []
    losses = [loss([])]
    for _ in range(3):
        left = [layer for layer in range(tiny.arch.layers) if layer not in order]
        order.append(min(left, key=lambda layer: loss([*order, layer])))
        losses.append(loss(order))
    decision = GreedyLoss(
        remove=3, shortlist=None, revise=False, compute_dtype="float32", refit=False
    ).decide(model)
    assert list(decision.edits) == [Drop(tuple(sorted(order)))]
    assert decision.log["order"] == order
    assert decision.log["dense_perplexity"] == pytest.approx(exp(losses[0]), rel=1e-4)
    assert [step["loss"] for step in decision.log["steps"]] == pytest.approx(losses[1:], rel=1e-4)
    assert [step["increase"] for step in decision.log["steps"]] == pytest.approx(
        [b - a for a, b in pairwise(losses)], abs=1e-4
    )


@pytest.mark.families("roles")
@pytest.mark.parametrize("unit", ["attention", "mlp"])
@pytest.mark.parametrize("model_type", sorted(tables().keys() - HALF_BLOCKS))
def test_parts_are_removed_by_zeros_that_stock_transformers_loads(
    model_type: str, unit: Any, tmp_path: Path
) -> None:
    """The written model's loss is the one that the search measured without the parts."""
    tiny, model = random_view(tmp_path, model_type)
    method = GreedyLoss(remove=2, unit=unit, compute_dtype="float32", refit=False)
    assert method.predict(tiny.arch) == tiny.arch
    decision = method.decide(model)
    edits = list(decision.edits)
    assert all(isinstance(edit, Overwrite) for edit in edits)
    assert decision.log["kept"] == list(range(tiny.arch.layers))
    assert [[layer, unit] for layer in sorted(decision.log["order"])] == decision.log["zeroed"]
    rewrite(model.checkpoint, tiny.arch, edits, tmp_path / "out", ram_bytes=1 << 30)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = model.calibration().tokens.ids
    with torch.no_grad():
        logits = loaded(ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert log(decision.log["perplexity"]) == pytest.approx(float(loss), rel=1e-3)


def test_a_killed_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    _, model = random_view(tmp_path, "llama")
    whole = GreedyLoss(remove=3).decide(model)
    again = GreedyLoss(remove=3).decide(model)
    assert again.log["passes"]["block_forwards"] == 0, "every loss was on the disk"
    assert {**again.log, "passes": 0} == {**whole.log, "passes": 0}


def test_the_ends_can_be_protected_and_blocks_listed(tmp_path: Path) -> None:
    tiny, model = random_view(tmp_path, "llama")
    found = GreedyLoss(remove=2, protect_first=2, protect_last=2).decide(model)
    assert found.log["dropped"] == [2, 3]
    listed = GreedyLoss(layers=(4, 1), refit=False)
    assert listed.statistics(tiny.arch) == ()
    assert list(listed.decide(model).edits) == [Drop((1, 4))]
    part = GreedyLoss(layers=(4, 1), unit="mlp").decide(model)
    assert part.log["zeroed"] == [[1, "mlp"], [4, "mlp"]]
    with pytest.raises(PlanError, match="of 6 blocks to choose from"):
        GreedyLoss(remove=3, protect_first=2, protect_last=2).predict(tiny.arch)
    with pytest.raises(PlanError, match="has layers 0 to 5"):
        GreedyLoss(layers=(6,), unit="mlp").predict(tiny.arch)


def test_the_plan_knows_how_many_passes_it_takes(tmp_path: Path) -> None:
    tiny, _ = random_view(tmp_path, "llama")
    (cheap,) = GreedyLoss(remove=1, samples=4).statistics(tiny.arch)
    (dear,) = GreedyLoss(remove=4, samples=4, beam=2).statistics(tiny.arch)
    assert isinstance(cheap, ExtraPass)
    assert (cheap.samples, cheap.length) == (4, 256)
    assert dear.forwards > 2 * cheap.forwards
