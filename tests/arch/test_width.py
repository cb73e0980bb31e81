"""The dims strings mean what they say: cut by them, a model loses just those contributions."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_export.arch import Arch
from tests.arch.tiny_models import Tiny, logits

State = dict[str, torch.Tensor]


def cut(arch: Arch, state: State, axis: str, index: Sequence[int]) -> tuple[Arch, State]:
    """What surgery does, in five lines: every tensor that uses the axis keeps its positions."""
    state = dict(state)
    for tensor in arch.using(axis):
        for dimension, positions in tensor.dims.kept(axis, index, arch.sizes):
            state[tensor.name] = state[tensor.name].index_select(dimension, torch.tensor(positions))
    return arch.resized(axis, len(index)), state


def loaded(arch: Arch, state: State, tiny: Tiny, out: Path) -> PreTrainedModel:
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(arch.to_config(tiny.full)))
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def ablated(tiny: Tiny, path: str, kept: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Logits of the whole model where module `path` of block i sees zeros outside `kept[i]`.

    `kept` counts runs of `width` features of the module's input.
    """
    hooks = []
    for block, runs in zip(tiny.model.get_submodule(tiny.arch.table.blocks), kept, strict=True):
        seen = torch.cat([torch.arange(run * width, (run + 1) * width) for run in runs])

        def silence(_module: object, inputs: Any, seen: torch.Tensor = seen) -> Any:
            mask = torch.zeros_like(inputs[0])
            mask[..., seen] = 1
            return (inputs[0] * mask, *inputs[1:])

        hooks.append(block.get_submodule(path).register_forward_pre_hook(silence))
    found = tiny.logits()
    for hook in hooks:
        hook.remove()
    return found


def channels(layers: int, size: int, count: int) -> list[list[int]]:
    """A different choice in each layer."""
    generator = torch.Generator().manual_seed(1)
    return [
        sorted(torch.randperm(size, generator=generator)[:count].tolist()) for _ in range(layers)
    ]


MLP = [
    ("llama", {}, "mlp.down_proj"),
    ("llama", {"mlp_bias": True}, "mlp.down_proj"),
    ("phi", {}, "mlp.fc2"),
    ("phi3", {}, "mlp.down_proj"),
    ("gpt2", {}, "mlp.c_proj"),
    ("opt", {}, "fc2"),
    ("gpt_neox", {}, "mlp.dense_4h_to_h"),
    ("gemma3_text", {}, "mlp.down_proj"),
]


@pytest.mark.parametrize(("model_type", "changes", "down"), MLP)
def test_kept_mlp_channels_compute_as_the_whole_model_with_the_others_silenced(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any], down: str
) -> None:
    made = tiny(model_type, **changes)
    arch, state = made.arch, load_file(made.path / "model.safetensors")
    kept = channels(arch.layers, arch.sizes["mlp.0"], 20)
    for layer, index in enumerate(kept):
        arch, state = cut(arch, state, f"mlp.{layer}", index)
    expected = ablated(made, down, kept, 1)
    assert (expected - made.logits()).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(loaded(arch, state, made, tmp_path)), expected, atol=2e-4, rtol=1e-4
    )


GROUPS = [
    ("llama", {}, "self_attn.o_proj"),
    ("llama", {"attention_bias": True, "head_dim": 16}, "self_attn.o_proj"),
    ("qwen2", {}, "self_attn.o_proj"),
    ("qwen3", {}, "self_attn.o_proj"),
    ("phi3", {}, "self_attn.o_proj"),
    ("mixtral", {}, "self_attn.o_proj"),
]


@pytest.mark.parametrize(("model_type", "changes", "out"), GROUPS)
def test_kept_groups_compute_as_the_whole_model_with_the_others_silenced(
    tiny: Callable[..., Tiny], tmp_path: Path, model_type: str, changes: dict[str, Any], out: str
) -> None:
    made = tiny(model_type, **changes, num_attention_heads=8, num_key_value_heads=4)
    arch, state = made.arch, load_file(made.path / "model.safetensors")
    kept = channels(arch.layers, 4, 2)
    for layer, index in enumerate(kept):
        arch, state = cut(arch, state, f"kv.{layer}", index)
    # Query heads 2k and 2k + 1 share key-value head k.
    expected = ablated(made, out, kept, 2 * arch.sizes["dim"])
    assert (expected - made.logits()).abs().max() > 1e-2
    torch.testing.assert_close(
        logits(loaded(arch, state, made, tmp_path)), expected, atol=2e-4, rtol=1e-4
    )


HEADS = [("gpt2", "attn.c_proj"), ("gpt_neox", "attention.dense")]


@pytest.mark.parametrize(("model_type", "out"), HEADS)
def test_kept_heads_of_fused_projections_compute_as_the_whole_model_with_the_others_silenced(
    tiny: Callable[..., Tiny], model_type: str, out: str
) -> None:
    """A stock config cannot say fewer heads here, so the modules get the narrow weights."""
    made = tiny(model_type)
    arch, state = made.arch, load_file(made.path / "model.safetensors")
    kept, width = channels(arch.layers, 4, 2), arch.sizes["dim"]
    for layer, index in enumerate(kept):
        arch, state = cut(arch, state, f"kv.{layer}", index)
    narrow = copy.deepcopy(made.model)
    for tensor in (tensor for tensor in arch.tensors if tensor.layer is not None):
        narrow.get_parameter(tensor.name).data = state[tensor.name]
    for block in narrow.get_submodule(arch.table.blocks):
        if model_type == "gpt2":
            block.attn.c_attn.nf, block.attn.split_size = 3 * 2 * width, 2 * width
    expected = ablated(made, out, kept, width)
    assert (expected - made.logits()).abs().max() > 1e-2
    torch.testing.assert_close(logits(narrow), expected, atol=2e-4, rtol=1e-4)


def test_kept_channels_of_each_expert(tiny: Callable[..., Tiny], tmp_path: Path) -> None:
    made = tiny("mixtral")
    arch, whole = made.arch, load_file(made.path / "model.safetensors")
    state, silent = dict(whole), {name: value.clone() for name, value in whole.items()}
    experts = [(layer, expert) for layer in range(arch.layers) for expert in range(4)]
    for (layer, expert), index in zip(experts, channels(len(experts), 48, 20), strict=True):
        arch, state = cut(arch, state, f"moe.{layer}.{expert}", index)
        others = sorted(set(range(48)) - set(index))
        silent[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"][:, others] = 0
    smaller = logits(loaded(arch, state, made, tmp_path))
    expected = logits(loaded(made.arch, silent, made, tmp_path))
    assert (expected - made.logits()).abs().max() > 1e-2
    torch.testing.assert_close(smaller, expected, atol=2e-4, rtol=1e-4)
