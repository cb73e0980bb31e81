from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from prune_export.arch import Arch
from prune_export.errors import PlanError, UnsupportedArch
from tests.arch.tiny_models import arch_of, tiny_config

# config.json as the Hub has it, written by many releases of transformers, and the known count.
PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


def full(config: dict[str, Any]) -> dict[str, Any]:
    return AutoConfig.for_model(**config).to_dict()


def bound(model_type: str, **changes: Any) -> Arch:
    return Arch.from_config(full({"model_type": model_type, **tiny_config(model_type, changes)}))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_and_give_the_known_number_of_parameters(
    name: str,
) -> None:
    config = PUBLISHED[name]["config"]
    arch = Arch.from_config(full(config))
    assert arch.parameters() == PUBLISHED[name]["parameters"]
    dropped = range(2, arch.layers - 1, 2)
    smaller = arch.without(dropped)
    per_block = sum(arch.parameters() - arch.without([layer]).parameters() for layer in dropped)
    assert smaller.parameters() == arch.parameters() - per_block
    again = Arch.from_config(full(smaller.to_config(config)))
    assert again.sizes == smaller.sizes
    assert again.tensors == smaller.tensors


def test_a_config_alone_is_enough() -> None:
    llama = PUBLISHED["meta-llama/Llama-3.1-70B"]["config"]
    arch = Arch.from_config(llama)
    assert arch.parameters() == 70_553_706_496
    assert arch.shape(arch.by_name["model.layers.79.self_attn.k_proj.weight"]) == (1024, 8192)
    written = arch.without(range(40, 72)).to_config(llama)
    assert written == llama | {"num_hidden_layers": 48}


def test_tensors_stand_in_the_order_of_the_model() -> None:
    names = [tensor.name for tensor in bound("llama").tensors]
    assert names[0] == "model.embed_tokens.weight"
    assert names[1] == "model.layers.0.input_layernorm.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_block() -> None:
    arch = bound("gpt2")
    assert len(arch.block(3)) == 12
    assert {tensor.layer for tensor in arch.block(3)} == {3}
    assert arch.block(6) == ()


def test_using_finds_what_a_cut_must_touch() -> None:
    arch = bound("llama", attention_bias=True, mlp_bias=True)
    assert [tensor.role for tensor in arch.using("kv.3")] == [
        "q", "q.bias", "k", "k.bias", "v", "v.bias", "o",
    ]  # fmt: skip
    assert [tensor.role for tensor in arch.using("mlp.0")] == [
        "gate",
        "gate.bias",
        "up",
        "up.bias",
        "down",
    ]
    # Embeddings, final norm, head; then two norms, q, k, v, o, gate, up, down and two biases each.
    assert len(arch.using("residual")) == 3 + 6 * 11
    assert arch.using("kv") == ()


def test_using_experts_finds_the_router_and_whole_experts() -> None:
    arch = bound("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[0])
    assert arch.using("expert.0") == ()
    roles = [tensor.role for tensor in arch.using("expert.1")]
    assert roles == ["router", *["expert.gate", "expert.up", "expert.down"] * 4]
    assert {tensor.expert for tensor in arch.using("moe.1.2")} == {2}


def test_fewer_experts() -> None:
    arch = bound("mixtral")
    smaller = arch.resized("expert.2", 3)
    gone = arch.by_name.keys() - smaller.by_name.keys()
    assert len(gone) == 3
    assert all(".layers.2.block_sparse_moe.experts.3." in name for name in gone)
    assert smaller.shape(smaller.by_name["model.layers.2.block_sparse_moe.gate.weight"]) == (3, 32)
    assert "moe.2.3" not in smaller.sizes


def test_fewer_experts_than_a_token_is_sent_to_are_refused() -> None:
    arch = bound("mixtral")
    for layer in range(6):
        arch = arch.resized(f"expert.{layer}", 1)
    with pytest.raises(
        PlanError, match=r"would be 1, fewer than num_experts_per_tok, 2\n.*at least 2"
    ):
        arch.to_config(arch.config)


def test_resized_counts_everywhere_that_the_axis_stands() -> None:
    arch = bound("phi3")
    smaller = arch.resized("kv.1", 1)
    assert arch.shape(arch.block(1)[1]) == (64, 32)
    assert smaller.shape(smaller.block(1)[1]) == (32, 32)
    assert smaller.shape(smaller.block(1)[2]) == (32, 16)
    assert smaller.shape(smaller.block(0)[1]) == (64, 32)
    assert smaller.without([0]).sizes["kv.0"] == 1


def test_resized_refuses() -> None:
    arch = bound("llama")
    with pytest.raises(PlanError, match=r"axis mpl\.1\n.*not an axis.*\n.*`mlp\.1`"):
        arch.resized("mpl.1", 4)
    with pytest.raises(PlanError, match="got size 0, expected at least 1"):
        arch.resized("mlp.1", 0)


def test_sizes_of_one_layer_alone_cannot_be_written() -> None:
    arch = bound("llama").resized("mlp.1", 40)
    with pytest.raises(PlanError, match=r"axis mlp\n.*sizes \[40, 48\] in different places"):
        arch.to_config(arch.config)


def test_sizes_that_the_family_has_no_key_for_cannot_be_written() -> None:
    arch = bound("gpt2")
    for layer in range(6):
        arch = arch.resized(f"kv.{layer}", 2)
    with pytest.raises(
        PlanError, match=r"cannot have size 8: a gpt2 config says `n_embd / n_head`"
    ):
        arch.to_config(arch.config)


def test_heads_that_transformers_would_refuse_are_refused_here() -> None:
    arch = bound("llama", num_attention_heads=8, num_key_value_heads=4)
    for layer in range(6):
        arch = arch.resized(f"kv.{layer}", 3)
    with pytest.raises(
        PlanError, match=r"num_attention_heads\n.*would be 6.*divides hidden_size, 32"
    ):
        arch.to_config(arch.config)


def test_cutting_one_of_two_axes_that_are_the_same_key_is_refused() -> None:
    """Without projections, OPT's embeddings are as wide as the residual stream."""
    arch = bound("opt").resized("residual", 24).resized("dim", 6)
    with pytest.raises(PlanError, match="no opt config can say"):
        arch.to_config(arch.config)


def test_a_written_width_states_every_size() -> None:
    arch = bound("llama")
    for layer in range(6):
        arch = arch.resized(f"kv.{layer}", 1)
    base = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 6,
    }
    written = arch.to_config(base)
    assert written["num_attention_heads"] == 2
    assert written["num_key_value_heads"] == 1
    assert written["head_dim"] == 8
    assert written["intermediate_size"] == 48


def test_depth_cuts_compose() -> None:
    arch = bound("gemma3_text")
    assert arch.without([1]).without([0, 3]) == arch.without([0, 1, 4])


def test_kept_and_origin() -> None:
    arch = bound("gpt2", tie_word_embeddings=True)
    kept = arch.kept([0, 1, 3])
    assert kept == (2, 4, 5)
    origin = arch.origin(kept)
    assert origin["transformer.h.1.attn.c_attn.bias"] == "transformer.h.4.attn.c_attn.bias"
    assert origin["transformer.wpe.weight"] == "transformer.wpe.weight"
    assert "lm_head.weight" not in origin
    assert origin.keys() == {tensor.name for tensor in arch.without([0, 1, 3]).stored()}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([6], "got \\[6\\], but the model has layers 0 to 5"),
        ([-1], "\\[-1\\]"),
        (range(6), "all 6 blocks"),
    ],
)
def test_impossible_cuts_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        bound("llama").without(layers)


def test_blocks_that_compute_with_their_number_are_not_renumbered() -> None:
    arch = bound("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert arch.without([4, 5]).layers == 4
    with pytest.raises(
        PlanError, match=r"scale_attn_by_inverse_layer_idx\n.*own number.*\n.*from the end"
    ):
        arch.without([2])


def test_pattern_keys_that_would_be_untrue_go_and_counts_are_recounted() -> None:
    gemma = bound("gemma3_text")
    written = gemma.without([2]).to_config(gemma.config)
    assert "sliding_window_pattern" not in written
    assert "_sliding_window_pattern" not in written
    assert written["layer_types"] == ["sliding_attention"] * 4 + ["full_attention"]
    qwen = bound("qwen2")
    written = qwen.without([0, 4]).to_config({"model_type": "qwen2", "num_hidden_layers": 6})
    assert written["max_window_layers"] == 2
    assert written["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    smol = bound("smollm3")
    written = smol.without([0]).to_config(smol.config)
    assert written["no_rope_layers"] == [1, 0, 1, 1, 0]
    assert "no_rope_layer_interval" not in written


def test_moe_layers_stay_moe_layers() -> None:
    arch = bound("qwen3_moe")  # sparse: 1 and 5, as every second is, but for 3
    written = arch.without([0, 2]).to_config(arch.config)
    assert written["decoder_sparse_step"] == 1
    assert written["mlp_only_layers"] == [1, 2]


def test_a_key_keeps_the_name_that_the_file_had_for_it() -> None:
    base = PUBLISHED["Qwen/Qwen3-30B-A3B"]["config"]
    written = Arch.from_config(full(base)).without([3]).to_config(base)
    assert written["num_experts"] == 128
    assert "num_local_experts" not in written
    gpt2 = bound("gpt2").without([3]).to_config({"model_type": "gpt2", "num_hidden_layers": 6})
    assert gpt2 == {"model_type": "gpt2", "num_hidden_layers": 5}


def test_two_names_that_disagree_are_refused() -> None:
    with pytest.raises(UnsupportedArch, match=r"hidden_size\n.*got 64, but n_embd.*is 32"):
        Arch.from_config({**bound("gpt2").config, "hidden_size": 64})


REFUSED = [
    (
        {"attention_sinks": 4},
        r"attention_sinks\n.*know this key \(value 4\)\n.*--ignore-config-key",
    ),
    ({"hidden_act": "gelu_newest"}, r"hidden_act\n.*'gelu_newest', the llama .*\n.*`gelu_new`"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config\n.*\n.*dequantize"),
    ({"per_layer_config": {"0": {}}}, r"per_layer_config\n.*\n.*different shapes"),
    ({"add_cross_attention": True}, "add_cross_attention"),
    ({"model_type": "lama"}, r"got 'lama'.*\n.*did you mean `llama`.*one YAML file"),
    ({"num_hidden_layers": 0}, "got 0, expected 1 or more"),
    ({"intermediate_size": [48, 32]}, r"intermediate_size\n.*\[48, 32\], expected one integer"),
    ({"intermediate_size": 0}, "`intermediate_size` is 0, expected at least 1"),
    ({"num_key_value_heads": 3}, "leaves a rest: 4 / 3"),
    ({"num_key_value_heads": 0}, "is 0, expected at least 1"),
    ({"vocab_size": None}, r"has none of what `vocab_size` needs\n.*save it once"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refuse_do_not_guess(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArch, match=message):
        Arch.from_config({**bound("llama").config, **change})


def test_a_key_that_the_caller_answers_for_is_let_pass() -> None:
    config = {**bound("llama").config, "attention_sinks": 4, "hidden_act": "mish"}
    with pytest.raises(UnsupportedArch):
        Arch.from_config(config, ignore_keys=["attention_sinks"])
    assert Arch.from_config(config, ignore_keys=["attention_sinks", "hidden_act"]).layers == 6


@pytest.mark.parametrize("given", [["full_attention"] * 5, "full_attention", 6])
def test_a_per_layer_list_of_another_length_is_refused(given: Any) -> None:
    with pytest.raises(UnsupportedArch, match=r"layer_types\n.*one entry for each of 6 layers"):
        Arch.from_config({**bound("qwen3").config, "layer_types": given})


def test_a_published_quantization_of_none_is_let_pass() -> None:
    assert Arch.from_config({**bound("llama").config, "quantization_config": None}).layers == 6


def test_final_norm() -> None:
    assert bound("llama").final_norm == "model.norm"
    assert bound("opt").final_norm == "model.decoder.final_layer_norm"
    assert bound("opt", do_layer_norm_before=False).final_norm is None


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen3_moe", "mixtral"])
def test_other_sizes_are_those_of_a_model_that_is_made_anew(model_type: str) -> None:
    arch = bound(model_type)
    for axis, size in arch.sizes.items():
        if size > 1:
            found = arch.resized(axis, size - 1)
            made = arch._bound(arch.config, arch.layers, {**arch.sizes, axis: size - 1})
            assert (found.tensors, dict(found.sizes)) == (made.tensors, dict(made.sizes))
            assert list(found.sizes) == list(made.sizes)


def with_steps(**changes: int) -> Arch:
    """Six blocks, of which keys of `ernie4_5_moe` say by step, first and last which are sparse."""
    return arch_of("ernie4_5_moe", **changes)


@pytest.mark.parametrize(
    ("changes", "drop", "left"),
    [
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 4}, (0, 3), (1, 2, 1)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": -1}, (2, 3, 4, 5), (2, 2, 1)),
        ({"moe_layer_interval": 2, "moe_layer_end_index": 5}, (0, 1), (1, 3, 2)),
        ({"moe_layer_interval": 2, "moe_layer_end_index": 5}, (0, 2, 4), (0, 2, 1)),
        ({"moe_layer_interval": 3, "moe_layer_end_index": 4}, (0, 1), (0, 0, 1)),
    ],
)
def test_which_layers_are_sparse_is_recounted(
    changes: dict[str, int], drop: tuple[int, ...], left: tuple[int, int, int]
) -> None:
    arch = with_steps(**changes)
    written = arch.without(drop).to_config(arch.config)
    keys = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    assert tuple(written[key] for key in keys) == left
    again = Arch.from_config(written)
    assert {t.name: again.shape(t) for t in again.stored()} == {
        t.name: arch.without(drop).shape(t) for t in arch.without(drop).stored()
    }


def test_blocks_left_whose_kinds_no_keys_can_say_are_refused() -> None:
    arch = with_steps(moe_layer_interval=2, moe_layer_start_index=0, moe_layer_end_index=5)
    with pytest.raises(PlanError, match="cannot say which of the 5 blocks left") as refusal:
        arch.without((4,))
    assert "drop other blocks" in refusal.value.fix


def test_experts_that_are_chosen_by_groups_are_not_cut() -> None:
    arch = arch_of("glm4_moe", n_group=2)
    axes = [axis for axis in arch.sizes if axis.startswith("expert.")]
    with pytest.raises(PlanError, match="divided into 2 groups by `n_group`"):
        arch.with_sizes(dict.fromkeys(axes, 2)).to_config(arch.config)


def test_a_shared_expert_is_as_wide_as_whole_experts() -> None:
    arch = arch_of("glm4_moe")
    moe = [axis for axis in arch.sizes if axis.startswith("moe.")]
    assert arch.with_sizes(dict.fromkeys(moe, 8)).to_config(arch.config)["n_shared_experts"] == 2
    with pytest.raises(PlanError, match=r"`shared / moe`, which would be no whole number"):
        arch.with_sizes(dict.fromkeys(moe, 12)).to_config(arch.config)


def test_what_blocks_divide_by_the_root_of_their_number_is_scaled() -> None:
    arch = arch_of("minicpm3")
    written = arch.without((1, 4, 5)).to_config(arch.config)
    assert written["scale_depth"] == pytest.approx(1.4 * 0.5**0.5)
    assert arch.to_config(arch.config)["scale_depth"] == 1.4


def test_blocks_that_the_model_cannot_do_without_are_not_chosen_from() -> None:
    assert bound("llama").droppable == range(6)
    arch = bound("gemma4_text")
    assert arch.droppable == range(5)
    with pytest.raises(
        PlanError, match=r"layer_types\n.*would end with 'sliding.*\n.*keep block 5"
    ):
        arch.without([5])
    assert arch.without([3, 4, 5]).layers == 3, "another block of that kind may be the last one"


def test_sizes_of_a_kind_of_layers_are_read_once_or_layer_by_layer() -> None:
    keys = {"head_dim": 16, "num_key_value_heads": 1}
    whole = full({"model_type": "gemma4_text", **tiny_config("gemma4_text", {})})
    assert whole["per_layer_config"] == {"2": keys, "5": keys}
    arch = Arch.from_config(whole)
    once = {key: value for key, value in whole.items() if key != "per_layer_config"}
    once |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    assert Arch.from_config(once).sizes == arch.sizes
    cut = arch.without([0, 3])
    assert cut.to_config(whole)["per_layer_config"] == {"1": keys, "3": keys}
    assert cut.to_config(once)["global_head_dim"] == 16
    for odd in ({"2": keys}, {"2": keys, "5": {**keys, "head_dim": 8}}, {"2": {"x": 1}}):
        with pytest.raises(UnsupportedArch, match=r"per_layer_config\n.*\[2, 5\]"):
            Arch.from_config(whole | {"per_layer_config": odd})
