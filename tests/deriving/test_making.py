"""Tables that are derived: compared with ours, proven for types that have none, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.deriving.making import derive, prove_table
from prune_export.errors import PlanError, UnsupportedArch

Config = Callable[..., dict[str, Any]]

SMALL = {"num_hidden_layers": 6, "vocab_size": 640}
"""Fewer layers than a class's own default: what is derived is the same, and quicker."""

OURS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_layer": 6},
    "gpt_neox": {},
    "opt": {"pad_token_id": 0},
    "gemma2": {},
    "olmo2": {"pad_token_id": 0},
    "starcoder2": {},
}


def meanings(arch: Arch) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Each tensor's role, and which positions of it belong to which place of each axis."""
    found = {}
    for tensor in arch.tensors:
        places = tuple(
            (axis, place, tensor.dims.kept(axis, [place], arch.sizes))
            for axis in sorted(tensor.dims.axes())
            for place in (0, arch.sizes[axis] - 1)
            if not axis.startswith(("vocab", "positions", "group"))
        )
        found[tensor.name] = (tensor.role, places)
    return found


@pytest.mark.parametrize("model_type", sorted(OURS))
def test_what_is_derived_of_a_family_with_a_table_is_that_table(
    config_of: Config, model_type: str
) -> None:
    full = config_of(model_type, **{**SMALL, **OURS[model_type]})
    found = derive(full)
    assert not found.failed
    by_hand, derived = table_for(model_type), found.table
    mine, theirs = Arch.from_config(full, table=derived), Arch.from_config(full, table=by_hand)
    assert meanings(mine) == meanings(theirs)
    assert mine.parallel == theirs.parallel
    for fact in ("layers", "blocks", "final_norm", "norm", "norm_offset", "architectures",
                 "scaled_embeddings", "added_times", "tuple_mlp", "parts_add"):  # fmt: skip
        assert getattr(derived, fact) == getattr(by_hand, fact), fact
    added = [table.added_when is None for table in (derived, by_hand)]
    assert added[0] == added[1] or model_type in ("opt", "gemma2", "olmo2")
    assert set(derived.config.writes.items()) <= set(by_hand.config.writes.items()) or (
        model_type in ("gpt2",)
    )


OTHERS = {
    "iquestcoder": {"MLP width", "heads"},
    "granite_swa": {"MLP width"},
    "biogpt": {"MLP width"},
    "gpt_neo": {"MLP width"},
    "mellum": {"experts' width", "heads"},
    "flint": {"MLP width", "experts' width", "shared expert's width", "heads"},
    "nanochat": {"MLP width"},
}
"""Types of transformers that have no table, and the width that is proven of each."""


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_a_type_without_a_table_is_derived_and_proven(config_of: Config, model_type: str) -> None:
    full = config_of(model_type)
    found = derive(full)
    assert not found.failed
    proven = {one.what for one in found.checks if one.ok}
    assert proven >= {
        "names and shapes", "module paths", "unchanged config", "depth cut = blocks bypassed",
        "cache", "blocks one at a time", "this config's names and shapes", "each size varied",
    } | OTHERS[model_type]  # fmt: skip
    assert "heads" in proven or found.table.derived.unproven["heads"]
    arch = Arch.from_config(full, table=found.table)
    assert arch.layers == full[found.table.layers]
    roles = {tensor.role for tensor in arch.block(0)}
    assert roles >= {"q", "k", "v", "o"}


def test_facts_that_no_shape_shows(config_of: Config) -> None:
    full = config_of("granite_swa", residual_multiplier=0.5)
    table = derive(full).table
    assert table.added_times == "residual_multiplier"
    assert table.config.per_layer == ["layer_rope_theta", "layer_types"]
    assert table.untraceable == "its attention takes `s_aux`"
    after = Arch.from_config(full, table=table).without((0, 1, 4)).to_config(full)
    assert len(after["layer_types"]) == len(after["layer_rope_theta"]) == after["num_hidden_layers"]


def test_what_is_not_proven_is_refused_by_the_table(config_of: Config) -> None:
    """The norm over all of the MLP's channels makes a narrower MLP another function."""
    full = config_of("bitnet", num_hidden_layers=6)
    found = derive(full)
    assert not found.failed
    assert "the logits differ" in found.table.derived.unproven["MLP width"]
    arch = Arch.from_config(full, table=found.table)
    sizes = {axis: 64 for axis in arch.sizes if axis.startswith("mlp.")}
    with pytest.raises(PlanError, match="axis mlp"):
        arch.with_sizes(sizes).to_config(full)
    arch.without((1,)).to_config(full)


def test_a_block_that_computes_with_its_number_is_disproved(config_of: Config) -> None:
    found = derive(config_of("diffllama"))
    assert [one.what for one in found.failed] == ["depth cut = blocks bypassed"]
    assert "the logits differ" in found.failed[0].found


def test_blocks_that_cannot_run_alone_are_disproved(config_of: Config) -> None:
    """Its attention insists on a mask of as many windows as there are, which calibration shares."""
    found = derive(config_of("xglm", num_layers=6))
    assert [one.what for one in found.failed] == ["blocks one at a time"]


@pytest.mark.parametrize(
    ("model_type", "problem"),
    [
        ("hrm_text", "0 lists of 6 blocks"),
        ("mamba", "how many"),
        ("t5", "no causal language model"),
    ],
)
def test_where_no_table_can_be_made_it_says_why(
    config_of: Config, model_type: str, problem: str
) -> None:
    with pytest.raises(UnsupportedArch, match=problem) as caught:
        derive(config_of(model_type))
    assert caught.value.fix


def test_a_wrong_table_is_disproved(config_of: Config) -> None:
    """Rows of the same shapes, but for what they mean: only what the model computes tells."""
    table = derive(config_of("iquestcoder", num_hidden_layers=6, vocab_size=640)).table
    checks, _ = prove_table(table)
    assert all(one.ok for one in checks)
    rows = [
        row.model_copy(update={"dims": "(group kv dim) residual"}) if row.role == "q" else row
        for row in table.block
    ]
    checks, _ = prove_table(table.model_copy(update={"block": rows}))
    assert [one.what for one in checks if not one.ok] == ["heads"]
    keys = table.config.model_copy(update={"writes": {}})
    checks, _ = prove_table(table.model_copy(update={"config": keys}))
    assert {one.what: one.word for one in checks if not one.ok} == {
        "MLP width": "refused",
        "heads": "refused",
    }
    tiny = table.tiny.model_copy(update={"config": {"num_attention_heads": 7}})
    with pytest.raises(UnsupportedArch, match="transformers cannot make this model"):
        prove_table(table.model_copy(update={"tiny": tiny}))
