"""Choosing block by block: scores in a cut view are those of a cut model; the loss may decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export import registry
from prune_export.arch.table import tables
from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    CalibrationContext,
    gather,
)
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.pruning.depth.selection import iterative
from prune_export.surgery import Drop, rewrite
from tests.views import decided, random_view

MACHINE = Machine("cpu", 8 << 30, 0, 1)
SELECTING = ("block_influence", "perplexity", "taylor")


def of(name: str, **keys: Any) -> Any:
    protect = {} if name == "block_influence" else {"protect_first": 1, "protect_last": 0}
    return registry.find("methods", name)(**protect, **keys)


@pytest.mark.families("roles")
@pytest.mark.parametrize("model_type", sorted(tables()))
def test_a_view_without_blocks_is_the_cut_model(model_type: str, tmp_path: Path) -> None:
    _, model = random_view(tmp_path, model_type, 4, 2)
    cut = rewrite(model.checkpoint, model.arch, [Drop((1, 4))], tmp_path / "cut", ram_bytes=1 << 30)
    seen = model.without((1, 4))
    seen.checkpoint.check(seen.arch)
    asked = [BlockInfluence(), AngularDistance()]
    found, expected = (
        seen.gather(asked),
        gather(cut, asked, CalibrationContext(model.calibration().tokens, MACHINE)),
    )
    for statistic in asked:
        assert torch.equal(found[statistic], expected[statistic])


def test_two_cuts_of_one_depth_are_not_mistaken_for_each_other(tmp_path: Path) -> None:
    _, model = random_view(tmp_path, "llama", 4, 2)
    first = model.without((1,)).gather([BlockInfluence()])[BlockInfluence()]
    second = model.without((2,)).gather([BlockInfluence()])[BlockInfluence()]
    assert not torch.equal(first, second)


def test_scores_are_asked_again_after_each_removal(tmp_path: Path) -> None:
    """By hand: block 1 scores least; without it, block 3 does, which did not at first."""
    _, model = random_view(tmp_path, "llama", 4, 2)
    told = iter([[0.0, 1, 2, 3, 4, 5], [0.0, 9, 1, 8, 8]])
    found = iterative(model, 2, range(1, 6), lambda _: next(told))
    assert found.log["order"] == [1, 3]
    assert found.log["steps"] == [
        {"removed": 1, "score": 1, "runner_up": 2, "margin": 1},
        {"removed": 3, "score": 1, "runner_up": 5, "margin": 7},
    ]


@pytest.mark.parametrize("name", SELECTING)
def test_iterative_is_one_shot_again_and_again(name: str, tmp_path: Path) -> None:
    _, model = random_view(tmp_path, "llama", 4, 2)
    found = decided(of(name, remove=3, select="iterative"), model).log["order"]
    gone: list[int] = []
    for _ in range(3):
        left = model.without(gone)
        numbers = [layer for layer in range(6) if layer not in gone]
        (layer,) = decided(of(name, remove=1), left).log["dropped"]
        gone.append(numbers[layer])
    assert found == gone


@pytest.mark.parametrize("name", SELECTING)
def test_guided_by_a_score_the_loss_decides(name: str, tmp_path: Path) -> None:
    """Six blocks are fewer than are tried: what goes is what plain greedy removal takes."""
    _, model = random_view(tmp_path, "llama", 4, 2)
    found = decided(of(name, remove=2, select="greedy"), model)
    protect = {} if name == "block_influence" else {"protect_first": 1}
    greedy = registry.find("methods", "greedy_loss")
    expected = decided(greedy(remove=2, revise=False, **protect), model)
    assert found.log["order"] == expected.log["order"]
    assert found.log["perplexity"] == pytest.approx(expected.log["perplexity"], rel=1e-6)
    assert len(found.log["steps"]) == 2


@pytest.mark.parametrize("name", SELECTING)
def test_a_run_is_chosen_at_once_or_refused(name: str) -> None:
    with pytest.raises(PlanError, match="with `contiguous`"):
        of(name, remove=2, contiguous=True, select="iterative")
