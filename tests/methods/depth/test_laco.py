"""Folding layers: the merges against whole models, the sweep and the exact targets by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations as all_of
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.calibrate import (
    Chain,
    Layer,
    MergeSimilarity,
)
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.methods.depth.laco import Laco
from prune_export.pruning.depth.collapse import FoldSearch, combinations, folded
from prune_export.surgery import rewrite
from tests.views import random_view

MACHINE = Machine("cpu", 8 << 30, 0, 1)


def chain(layers: int) -> Chain:
    return tuple(Layer.plain(block) for block in range(layers))


def test_the_three_merges_by_hand() -> None:
    assert folded(chain(5), 1, 2, "drop") == (*chain(2), *chain(5)[4:])
    assert folded(chain(5), 1, 2, "last")[1] == Layer(1, ((3, 1.0),))
    # theta_1 + (theta_2 - theta_1) + (theta_3 - theta_1)
    assert folded(chain(5), 1, 2, "rdsc")[1] == Layer(1, ((1, -1.0), (2, 1.0), (3, 1.0)))
    twice = folded(folded(chain(5), 2, 2, "rdsc"), 1, 1, "rdsc")
    assert twice == (chain(5)[0], Layer(1, ((2, -1.0), (3, 1.0), (4, 1.0))))


def test_with_one_layer_the_paper_and_its_code_agree() -> None:
    for at in range(4):
        assert folded(chain(5), at, 1, "rdsc") == folded(chain(5), at, 1, "last")


@dataclass
class Told:
    """Similarities by a rule on the blocks whose norms are left."""

    layers: int
    loses: Mapping[int, float]
    asked: list[Chain] = field(default_factory=list)

    @property
    def dense(self) -> Chain:
        return chain(self.layers)

    def similarity(self, tried: Chain, *, keep: Iterable[Chain] = ()) -> float:
        del keep
        self.asked.append(tried)
        left = {layer.of for layer in tried}
        return 1.0 - sum(loss for block, loss in self.loses.items() if block not in left)


def search(told: Told, merge_layers: int = 3, interval: int = 1, lowest: int = 0) -> FoldSearch:
    return FoldSearch(told, "drop", merge_layers, interval, lowest, told.layers)  # type: ignore[arg-type]


def test_the_sweep_goes_down_and_folds_what_stays_similar() -> None:
    # From the top: 4..6 fold to 4 (5, 6 go); 3..5 do not, as 4 is dear; then 1..3 (2, 3 go).
    told = Told(7, {0: 9.0, 1: 9.0, 2: 0.1, 3: 0.1, 4: 9.0, 5: 0.1, 6: 0.1})
    found = search(told).sweep(threshold=0.5)
    assert [layer.of for layer in found.chain] == [0, 1, 4]
    assert [(fold.of, fold.layers) for fold in found.folds] == [(4, 2), (1, 2)]
    assert [fold.similarity for fold in found.folds] == pytest.approx([0.8, 0.6])


def test_a_budget_makes_the_last_fold_partial_and_lowers_the_threshold() -> None:
    told = Told(7, dict.fromkeys(range(7), 0.1))
    found = search(told).sweep(0.0, 3)
    assert [(fold.of, fold.layers) for fold in found.folds] == [(4, 2), (3, 1)]
    # 0.75 allows two layers only; three need a lower one.
    assert search(told).sweep(0.75).count == 2
    lowered = search(told).budget(0.75, 3)
    assert lowered.count == 3
    assert lowered.threshold == pytest.approx(0.65)


def test_bisection_takes_the_highest_threshold_that_suffices() -> None:
    told = Told(8, {1: 0.3, 2: 0.3, 3: 0.3, 5: 0.02, 6: 0.02, 7: 0.2, 0: 0.9, 4: 0.9})
    found = search(told, merge_layers=2).bisection(2)
    # Low thresholds take 7 on the way down; at 0.9 only 6 and 5 fold.
    assert [layer.of for layer in found.chain] == [0, 1, 2, 3, 4, 7]
    assert found.threshold is not None
    assert 0.8 <= found.threshold < 0.96


@pytest.mark.parametrize("count", [1, 3, 4])
def test_combinations_of_runs_are_the_best_there_are(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    runs = {
        (at, size): float(torch.rand((), generator=generator))
        for size in (1, 2)
        for at in range(1, 7 - size)
    }

    def valid(chosen: tuple[tuple[int, int], ...]) -> bool:
        taken = [layer for at, size in chosen for layer in range(at, at + size + 1)]
        return sum(s for _, s in chosen) == count and len(taken) == len(set(taken))

    every = [
        chosen
        for number in (1, 2, 3, 4)
        for chosen in all_of(sorted(runs), number)
        if valid(chosen)
    ]
    every.sort(key=lambda chosen: sum(log(runs[run]) for run in chosen), reverse=True)
    assert every, "the case has solutions"
    assert combinations(runs, 1, 7, count, 3) == every[:3]


def last_states(path: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1]


@pytest.mark.parametrize("merge", ["rdsc", "last", "drop"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen2", "mixtral", "phi3"])
def test_the_written_model_is_the_one_that_was_measured(
    model_type: str, merge: Any, tmp_path: Path
) -> None:
    tiny, model = random_view(tmp_path, model_type)
    method = Laco(remove=2, merge=merge, merge_layers=3, lowest=0, refit=False)
    decision = method.decide(model)
    out = tmp_path / "out"
    rewrite(model.checkpoint, tiny.arch, decision.edits, out, ram_bytes=1 << 30)
    assert Checkpoint.open(out).arch().layers == method.predict(tiny.arch).layers == 4
    ids = model.calibration().tokens.ids
    dense, small = last_states(tiny.path, ids), last_states(out, ids)
    cosine = torch.nn.functional.cosine_similarity(dense.flatten(1), small.flatten(1)).mean()
    assert decision.log["similarity"] == pytest.approx(float(cosine), abs=2e-3)


def test_last_is_dropping_with_transferred_norms(tmp_path: Path) -> None:
    tiny, model = random_view(tmp_path, "llama")
    decision = Laco(remove=2, merge="last", merge_layers=3, lowest=0, refit=False).decide(model)
    ((of, count, _),) = decision.log["folds"] if len(decision.log["folds"]) == 1 else ((0, 0, 0),)
    if not count:
        pytest.fail("the case was meant to have one run of two")
    out = tmp_path / "out"
    after = rewrite(model.checkpoint, tiny.arch, decision.edits, out, ram_bytes=1 << 30)
    for tensor in tiny.arch.block(of):
        place = tensor.name
        rest = place.removeprefix(f"model.layers.{of}.")
        kept = of if tensor.role.startswith("norm") else of + count
        expected = model.checkpoint.read(f"model.layers.{kept}.{rest}")
        assert torch.equal(after.read(place), expected), place


@pytest.mark.parametrize("target", ["segments", "budget", "bisection"])
@pytest.mark.parametrize("remove", [1, 3])
def test_every_target_is_met_exactly(target: Any, remove: int, tmp_path: Path) -> None:
    _, model = random_view(tmp_path, "llama")
    decision = Laco(remove=remove, target=target, merge_layers=3, lowest=0, refit=False).decide(
        model
    )
    assert len(decision.log["dropped"]) == remove
    assert sum(layers for _, layers, _ in decision.log["folds"]) == remove


def test_untouched_layers_are_shared_and_similarities_kept(tmp_path: Path) -> None:
    _, model = random_view(tmp_path, "llama")
    context = model.calibration()
    with MergeSimilarity(model.checkpoint, context) as measured:
        measured.similarity(measured.dense)
        assert measured.block_forwards == 6
        tried = folded(measured.dense, 4, 1, "last")
        measured.similarity(tried)
        assert measured.block_forwards == 6 + 1, "only the folded layer"
        assert measured.similarity(measured.dense) == pytest.approx(1.0)
    with MergeSimilarity(model.checkpoint, context) as again:
        assert again.similarity(tried) < 1.0
        assert again.block_forwards == 0


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tiny, _ = random_view(tmp_path, "qwen3_moe")
    with pytest.raises(PlanError, match="differ in shape"):
        Laco(remove=1).predict(tiny.arch)
    assert Laco(remove=1, merge="drop").predict(tiny.arch).layers == 5
    with pytest.raises(PlanError, match="at most 3"):
        Laco(remove=4, merge="drop").predict(tiny.arch)
    with pytest.raises(PlanError, match="laco folds runs"):
        Laco(layers=(1,))
    with pytest.raises(PlanError, match="`sparsity` and `remove`"):
        Laco(sparsity=0.1, remove=1)
