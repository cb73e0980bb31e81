"""A plan knows how many parts of blocks are zero after its stages, and refuses to zero more."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune_export.ablated import Places
from prune_export.errors import PlanError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.planning import Plan
from prune_export.recipe import Recipe

LORA = {"heal": {"method": "lora", "rank": 2, "steps": 1, "batch": 1}}
FILLS = {"heal": {**LORA["heal"], "keep_zeros": False}}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))


def prune(method: str = "block_influence", **keys: Any) -> Any:
    return {"prune": {"method": method, **keys}}


def part(unit: str, remove: int | None = None, **keys: Any) -> Any:
    return prune(unit=unit, **({"remove": remove} if remove else {}), **keys)


def recipe(root: Path, *stages: Any) -> Recipe:
    data = {
        "calibration": {"files": ["calibration.txt"], "samples": 2, "length": 16},
        "healing": {"files": ["healing.jsonl"], "samples": 2, "length": 16},
    }
    return Recipe.parse(json.dumps({"recipe": 1, "data": data, "stages": stages}), root=root)


def test_more_parts_than_are_left_are_refused_before_the_work(
    tiny_llama: Path, corpus: Path, options: Options
) -> None:
    asked = recipe(corpus, part("attention", 4), part("attention", 3))
    with pytest.raises(PlanError) as error:
        run(asked, str(tiny_llama), options)
    assert str(error.value) == (
        "recipe  stages.1.prune.block_influence\n"
        "  unit: attention: 3 are to be removed, and at most 2 are left to choose from: of 4 "
        "blocks it is zero after earlier stages\n"
        "  remove fewer, or remove whole blocks"
    )
    assert not options.store.exists()


REFUSED: list[list[Any]] = [
    [part("mlp", 5), part("mlp", sparsity=0.34)],
    [part("mlp", 3), part("mlp", 2), part("mlp", 2)],
    [part("attention", layers=[0, 1, 2, 3]), part("attention", 3)],
    [part("attention", layers=[0, 1]), part("attention", layers=[1, 2]), part("attention", 4)],
    [part("attention", 4), LORA, part("attention", 3)],
    # Of blocks 2 to 5, all but at most one are gone, whichever the first stage chose.
    [part("mlp", 5), part("mlp", 2, method="perplexity", protect_first=2, protect_last=0)],
    # What is removed with its block is not there to be zeroed again, nor are others.
    [part("mlp", 4), prune("deepest", remove=1), part("mlp", 3)],
    [part("mlp", layers=[0, 1, 2, 3]), prune("deepest", layers=[5]), part("mlp", 2)],
]
FITS: list[list[Any]] = [
    [part("attention", 4), part("attention", 2)],
    [part("attention", 4), part("mlp", 4)],
    [part("attention", 4), part("attention", layers=[0, 1, 2, 3])],
    [part("attention", layers=[0, 1]), part("attention", layers=[1, 2]), part("attention", 3)],
    [part("attention", 4), FILLS, part("attention", 4)],
    [part("mlp", 3), part("mlp", 2, method="perplexity", protect_first=2, protect_last=0)],
    [part("mlp", 4), prune("deepest", remove=3), part("mlp", 2)],
    [part("mlp", layers=[0, 1, 2, 3]), prune("deepest", layers=[0]), part("mlp", 2)],
    [part("mlp", 4), prune("laco", remove=1), part("mlp", 3)],
    [part("mlp", 4), prune("minitron", ffn=0.25), part("mlp", 3)],
]


def planned(stages: list[Any], model: Path, corpus: Path, options: Options) -> Plan:
    return plan(recipe(corpus, *stages), str(model), options)


@pytest.mark.parametrize("stages", REFUSED)
def test_what_cannot_be_left_is_refused(
    stages: list[Any], tiny_llama: Path, corpus: Path, options: Options
) -> None:
    with pytest.raises(PlanError, match="are left to choose from"):
        planned(stages, tiny_llama, corpus, options)
    assert planned(stages[:-1], tiny_llama, corpus, options).stages


@pytest.mark.parametrize("stages", FITS)
def test_what_may_be_left_is_planned(
    stages: list[Any], tiny_llama: Path, corpus: Path, options: Options
) -> None:
    assert planned(stages, tiny_llama, corpus, options).stages


@given(st.integers(0, 10**6))
def test_no_more_is_taken_to_be_zero_than_is(seed: int) -> None:
    """Against stages that choose at random among what they may."""
    chance = random.Random(seed)
    layers = chance.randint(2, 9)
    gone: set[int] = set()
    known = Places()
    for _ in range(6):
        some = sorted(chance.sample(range(layers), chance.randint(1, layers)))
        assert known.least_in(some) <= len(gone & set(some))
        assert known.least_in(range(layers)) <= len(gone)
        kind = chance.choice(("listed", "chosen", "without", "without_some"))
        if kind == "listed":
            gone, known = gone | set(some), known.listed(some)
        elif kind == "chosen":
            free = [layer for layer in some if layer not in gone]
            taken = chance.sample(free, chance.randint(0, len(free)))
            gone, known = gone | set(taken), known.chosen(len(taken), some)
        elif len(some) < layers:
            kept = [layer for layer in range(layers) if layer not in some]
            gone = {kept.index(layer) for layer in gone if layer in kept}
            removed, layers = len(some), len(kept)
            known = (
                known.without(kept) if kind == "without" else known.without_some(removed, layers)
            )


def test_what_is_sure_is_known_exactly() -> None:
    places = Places().listed([1, 3]).chosen(2, [0, 1, 2])
    assert places.least_in([0, 1, 2]) == 3
    assert places.least_in([3]) == 1
    assert places.least_in([0, 3]) == 2
    assert places.without([0, 2, 3]).least_in([0, 1, 2]) == 3
