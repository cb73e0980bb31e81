"""Models whose blocks differ in kind: what says it, after any cut, and what cannot be said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.calibrate import linear_groups
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.methods.depth.block_influence import BlockInfluenceDrop
from prune_export.training.adapters.targets import targets
from tests.arch.tiny_models import Tiny, arch_of

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
HYBRIDS = sorted(
    model_type
    for model_type, table in tables().items()
    if any(row.role == "linear.out" for row in table.block)
)


def kinds(arch: Arch) -> list[str]:
    """Of each block, what mixes its tokens."""
    found = []
    for layer in range(arch.layers):
        roles = {tensor.role for tensor in arch.block(layer)}
        found.append("".join(k for k, role in (("a", "o"), ("l", "linear.out")) if role in roles))
    return found


def test_a_list_of_kinds_is_sliced() -> None:
    arch = arch_of("granitemoehybrid")
    assert kinds(arch) == ["a", "l", "l", "a", "l", "l"]
    cut = arch.without((0, 2))
    assert kinds(cut) == ["l", "a", "l", "l"]
    assert cut.to_config(arch.config)["layer_types"].count("full_attention") == 1


def test_older_names_of_kinds_mean_the_same() -> None:
    arch = arch_of("granitemoehybrid")
    older = {"full_attention": "attention", "linear_attention": "mamba"}
    listed = [older[kind] for kind in arch.config["layer_types"]]
    again = Arch.from_config({**arch.config, "layer_types": listed})
    assert again.tensors == arch.tensors


def test_a_list_of_layers_is_renumbered() -> None:
    arch = arch_of("bamba", attn_layer_indices=[1, 4])
    cut = arch.without((0, 2))
    assert cut.to_config(arch.config)["attn_layer_indices"] == [0, 2]
    assert kinds(cut) == ["a", "l", "a", "l"]
    assert arch.without((1, 4)).to_config(arch.config)["attn_layer_indices"] == []


@pytest.mark.parametrize(
    ("drop", "period", "offset"),
    [((0,), 3, 0), ((3, 4, 5), 2, 1), ((1, 4), 5, 4), ((0, 2, 3, 4, 5), 1, 0)],
)
def test_a_period_and_an_offset_are_found_that_say_what_is_left(
    drop: tuple[int, ...], period: int, offset: int
) -> None:
    arch = arch_of("jamba", num_experts=1, num_experts_per_tok=1)  # attention at 1 and 4
    written = arch.without(drop).to_config(arch.config)
    assert (written["attn_layer_period"], written["attn_layer_offset"]) == (period, offset)
    again = Arch.from_config(AutoConfig.for_model(**written).to_dict())
    assert kinds(again) == kinds(arch.without(drop))


def test_blocks_left_that_no_period_says_are_refused() -> None:
    arch = arch_of("jamba", num_hidden_layers=9)  # attention at 1, 4 and 7
    with pytest.raises(PlanError, match="cannot say which of the 8 blocks left") as refusal:
        arch.without((3,))
    assert "a period and an offset" in str(refusal.value)
    assert "drop other blocks" in refusal.value.fix


def test_a_set_whose_condition_does_not_hold_is_empty_and_not_rewritten() -> None:
    arch = arch_of("jamba", num_experts=1, num_experts_per_tok=1)
    assert not any(tensor.expert is not None for tensor in arch.tensors)
    written = arch.without((0, 2)).to_config(arch.config)
    assert (written["expert_layer_period"], written["expert_layer_offset"]) == (4, 1)


def test_an_adjusted_width_is_counted_as_it_is_and_cut_widths_are_said_plainly() -> None:
    base = PUBLISHED["LiquidAI/LFM2-1.2B"]["config"]
    arch = Arch.from_config(AutoConfig.for_model(**base).to_dict())
    assert arch.sizes["mlp.0"] == 8192  # two thirds of 12288, in multiples of 256
    narrow = arch.with_sizes({f"mlp.{layer}": 5000 for layer in range(arch.layers)})
    written = narrow.to_config(base)
    assert written["block_auto_adjust_ff_dim"] is False
    assert "intermediate_size" not in written
    assert written["block_ff_dim"] == 5000
    assert Arch.from_config(AutoConfig.for_model(**written).to_dict()).sizes == narrow.sizes


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_states_keep_their_widths(model_type: str) -> None:
    arch = arch_of(model_type)
    for name in ("inner", "states", "sheads", "lkey", "lvalue", "lheads", "channel", "kernel"):
        if name in arch.sizes and arch.sizes[name] > 1:
            with pytest.raises(PlanError, match=r"choose another axis or size|config can say"):
                arch.resized(name, arch.sizes[name] // 2).to_config(arch.config)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_projections_are_pruned_and_what_controls_a_state_is_not(model_type: str) -> None:
    arch = arch_of(model_type)
    for layer in range(arch.layers):
        block = {tensor.role for tensor in arch.block(layer)}
        groups = {group.kind: group for group in linear_groups(arch, layer)}
        assert ("linear.out" in groups) is ("linear.out" in block)
        if "linear.in" in groups:
            assert all(
                tensor.dims.of[1] == (("residual",),) for tensor in groups["linear.in"].tensors
            )
        named = {tensor.role for group in groups.values() for tensor in group.tensors}
        assert not named & {"linear.conv", "linear.decay", "linear.ba", "linear.x", "linear.dt"}
    if not any(tensor.expert is not None or "experts" in tensor.role for tensor in arch.tensors):
        assert {tensor.role for tensor in targets("all", arch)} == {
            tensor.role
            for layer in range(arch.layers)
            for group in linear_groups(arch, layer)
            for tensor in group.tensors
        } - set(arch.table.unadapted)


def test_a_pattern_gives_way_to_the_list_that_it_stands_for() -> None:
    """Nemotron-H as published: files have a pattern and a number, transformers a list alone."""
    listed = tables()["nemotron_h"].tiny.config["layers_block_type"]
    said = {key: value for key, value in tables()["nemotron_h"].tiny.config.items()
            if key != "layers_block_type"}  # fmt: skip
    file = {"model_type": "nemotron_h", **said, "num_hidden_layers": 6}
    file |= {"hybrid_override_pattern": "M-*EM*"}
    full = AutoConfig.for_model(**file).to_dict()
    assert full["layers_block_type"] == listed
    assert not full.keys() & {"num_hidden_layers", "hybrid_override_pattern"}
    arch = Arch.from_config(full)
    assert arch.layers == 6
    assert arch.to_config(file) == file
    written = arch.without((1, 4)).to_config(file)
    assert "hybrid_override_pattern" not in written
    assert written["num_hidden_layers"] == 4
    assert written["layers_block_type"] == [listed[i] for i in (0, 2, 3, 5)]
    loaded = AutoConfig.for_model(**written)
    assert (loaded.num_hidden_layers, loaded.hybrid_override_pattern) == (4, "M*E*")
    assert "num_hidden_layers" not in arch.without((1, 4)).to_config(full)


def test_parts_of_blocks_that_are_one_part_alone_are_refused() -> None:
    with pytest.raises(PlanError, match=r"block 1 has none.*\n.*unit: block"):
        BlockInfluenceDrop(remove=1, unit="attention").predict(arch_of("nemotron_h"))


def test_numbers_that_json_lacks_are_read(tiny: Callable[..., Tiny]) -> None:
    """Transformers writes an infinite limit of step sizes as an object."""
    made = tiny("bamba")
    raw = json.loads((made.path / "config.json").read_text())
    assert raw["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    full = Checkpoint.open(made.path).full_config()
    assert list(full["time_step_limit"]) == [0.0, float("inf")]
