"""What every registered method, healer and exporter owes; a new file is found here unasked.

Each method meets seven families that differ most, and a fifth of all pairs besides, so that every
family meets a fifth of the methods; `--all-pairs` runs all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from prune_export import registry
from prune_export.arch.table import tables
from prune_export.calibrate import as_matrix, linears
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids, write_grids
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.recipe.reference import described
from prune_export.report.reading import StageReading
from prune_export.surgery import rewrite
from tests.contracts.made import alike, an_instance, units_of, view_for
from tests.contracts.refused import refused_by, refuses

ENTRIES = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]

UNITS = [
    (name, unit)
    for name in registry.names("methods")
    for unit in units_of(registry.find("methods", name))
] + [(name, "quantize") for name in registry.names("quantize")]

PAIRS = [
    (name, unit, model_type)
    for name, unit in UNITS
    for model_type in sorted(tables())
    if not refuses(name, model_type, unit)
]
_FIRST = ("llama", "gpt2", "gemma2", "phi3", "qwen3_moe", "olmo2", "falcon")
"""Families that differ most from each other: each method meets them all."""
_EACH_ONCE = [pair for pair in PAIRS if pair[2] in _FIRST]


@pytest.mark.every("name")
@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_entry_is_a_frozen_dataclass_that_explains_itself(kind: Any, name: str) -> None:
    cls = registry.find(kind, name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    text = described(kind, name)
    assert text.summary.endswith("."), "the docstring's first line is a sentence"
    assert all(key.help for key in text.keys), "every key says what it means"


def _instance(name: str, unit: str | None) -> Any:
    if unit == "quantize":
        return an_instance(registry.find("quantize", name), None)
    return an_instance(registry.find("methods", name), unit)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "unit"), UNITS)
def test_a_method_refuses_these_families_and_no_others(
    name: str, unit: str | None, tiny: Callable[[str], Checkpoint]
) -> None:
    refused = set()
    for model_type in tables():
        try:
            _instance(name, unit).predict(tiny(model_type).arch())
        except PlanError as refusal:
            assert refusal.fix, (
                "a family that a method cannot do is refused with what to do instead"
            )
            refused.add(model_type)
    assert refused == refused_by(name, unit)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        pairs = PAIRS if metafunc.config.getoption("--all-pairs") else PAIRS[::5] + _EACH_ONCE
        metafunc.parametrize(("name", "unit", "model_type"), list(dict.fromkeys(pairs)))


@pytest.mark.every("name")
def test_a_method_leaves_what_it_predicted_and_it_reloads(
    name: str, unit: str | None, model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    method = _instance(name, unit)
    predicted = method.predict(arch)
    decision = method.decide(view_for(method, checkpoint, tmp_path))
    after = rewrite(checkpoint, arch, decision.edits, tmp_path / "out", ram_bytes=1 << 30)
    _lie_on_their_grids(after, decision)
    assert after.arch().layers == predicted.layers
    if not alike(arch) and "dropped" in decision.log:
        predicted = arch.without(decision.log["dropped"])
    assert {t.name: predicted.shape(t) for t in predicted.stored()} == {
        name: entry.shape for name, entry in after.entries.items()
    }
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    told = json.loads(json.dumps(decision.log))
    assert told, "the log says what was decided, as JSON"
    kind = "quantize" if unit == "quantize" else "prune"
    stage = {"index": 0, "kind": kind, "name": name, "log": told}
    TypeAdapter(StageReading).validate_python(stage)  # what a report reads of it has its types
    refit = decision.log.get("refit", {})
    assert refit.get("taken", True) or refit["why"]
    for seam in refit.get("seams", ()):
        assert seam["state_error"][1] <= seam["state_error"][0], "held-out states are truer"


def _lie_on_their_grids(checkpoint: Checkpoint, decision: Decision) -> None:
    """What a quantizer says of weights is true of what is stored, and can be read back."""
    if not decision.grids:
        return
    write_grids(checkpoint.path, decision.grids)
    grids = Grids.of(checkpoint)
    assert grids is not None
    tensors = {tensor.name: tensor for tensor in checkpoint.arch().stored()}
    assert sorted(grids) == sorted(tensor.name for tensor in linears(checkpoint.arch()))
    for name in grids:
        matrix = as_matrix(tensors[name], checkpoint.read(name))
        grid = grids.read(name)
        assert torch.equal(grid.values(grids.codes(name, matrix, grid)), matrix)
