"""Every table in families/ against transformers: a new file is tested here without an edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.deriving import proof
from prune_export.errors import PlanError
from tests.arch.tiny_models import Tiny, logits, tiny_config

VARIANTS = [
    pytest.param(model_type, changes, id=f"{model_type}-{name}")
    for model_type, table in sorted(tables().items())
    for name, changes in {"plain": {}, **table.tiny.variants}.items()
]
OWN_HEAD = {"nemotron_h"}
"""Families whose head transformers ties to nothing, whatever config.json says."""
DROPS = [(1,), (0, 2, 4), (0, 1, 3, 4, 5)]


@pytest.mark.every("model_type")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_names_and_shapes_are_those_on_disk(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any], tied: bool
) -> None:
    made = tiny(model_type, **changes, tie_word_embeddings=tied)
    proof.names_and_shapes(made)
    assert any(tensor.tied_to for tensor in made.arch.tensors) is (
        tied and model_type not in OWN_HEAD
    )


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_module_paths_exist(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    proof.module_paths(made)
    assert made.arch.table.final_norm


@pytest.mark.every("model_type")
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_depth_cut_computes_as_the_model_that_skips_those_blocks(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    for number, layers in enumerate(DROPS):
        assert proof.depth(made, layers, tmp_path / str(number)) <= 1e-6


def test_blocks_that_compute_with_their_number_may_lose_the_last(
    tiny: Callable[..., Tiny], tmp_path: Path
) -> None:
    made = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert proof.depth(made, (4, 5), tmp_path / "cut") <= 1e-6


PATTERNED = sorted(
    name
    for name, table in tables().items()
    # Where sizes follow the list, transformers refuses a model without it.
    if table.config.per_layer and table.config.by_kind is None
)


@pytest.mark.parametrize("model_type", PATTERNED)
def test_without_the_sliced_lists_the_cut_model_would_compute_something_else(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str
) -> None:
    made = tiny(model_type)
    rules = made.arch.table.config
    with proof.skipped(made, (1,)):
        expected = made.logits()
    proof.cut_depth(made, (1,), made.full, tmp_path / "cut")
    naive = made.full | {made.arch.table.layers: made.arch.layers - 1}
    for key in rules.per_layer:
        del naive[key]
    (tmp_path / "cut" / "config.json").write_text(json.dumps(naive))
    if AutoConfig.for_model(**naive).to_dict().get(rules.per_layer[0]) is None:
        return  # there is no default: nothing is built without the list
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_cut_model_generates_the_same_with_and_without_cache(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    assert proof.generation(made, DROPS[1], tmp_path / "cut") == "8 tokens"


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_file_without_defaults_gives_the_same_cut_as_a_full_one(
    model_type: str, changes: dict[str, Any]
) -> None:
    full = AutoConfig.for_model(model_type, **tiny_config(model_type, changes)).to_dict()
    arch = Arch.from_config(full)
    sparse = {"model_type": model_type, **tiny_config(model_type, changes)}
    written = arch.without(DROPS[1]).to_config(sparse)
    assert arch.table.config.derives == [] or set(arch.table.config.derives).isdisjoint(written)
    expected = AutoConfig.for_model(**arch.without(DROPS[1]).to_config(full)).to_dict()
    loaded = AutoConfig.for_model(**written).to_dict()
    for key in (*arch.table.depth_keys(), "rope_parameters"):
        assert loaded.get(key) == expected.get(key), key


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_nothing_is_written_where_nothing_is_cut(
    tiny: Callable[..., Tiny], model_type: str, changes: dict[str, Any]
) -> None:
    made = tiny(model_type, **changes)
    raw = json.loads((made.path / "config.json").read_text())
    assert made.arch.without(()).to_config(raw) == raw
    assert made.arch.to_config(made.full) == made.full


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_width_cut_is_written_so_that_transformers_builds_it_or_refused(
    model_type: str, changes: dict[str, Any]
) -> None:
    full = AutoConfig.for_model(model_type, **tiny_config(model_type, changes)).to_dict()
    arch, written = Arch.from_config(full), set()
    for name in arch.table.axes:
        try:
            smaller = halved(arch, name)
            config = smaller.to_config(full)
        except PlanError:
            continue
        if smaller == arch:
            continue
        written.add(name)
        loaded = AutoConfig.for_model(**config)
        assert Arch.from_config(loaded.to_dict()).sizes == smaller.sizes
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(loaded)
        assert smaller.parameters() == sum(value.numel() for value in model.parameters())
    assert written >= {"vocab", "mlp", "moe"} & {axis.split(".")[0] for axis in arch.sizes}


def halved(arch: Arch, name: str) -> Arch:
    """Halves an axis, and those that the same config key says with it."""
    axes, said = arch.table.axes, arch.table.axes[name].size
    for axis in [axis for axis in arch.sizes if axes[axis.split(".")[0]].size == said]:
        if arch.sizes.get(axis, 1) > 1:
            arch = arch.resized(axis, arch.sizes[axis] // 2)
    return arch
