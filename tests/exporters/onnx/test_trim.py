"""A wide checkpoint with zeroed structure becomes a narrow engine with the same logits."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters.onnx import Onnx
from tests.exporters.onnx.graphs import (
    FAMILIES,
    MACHINE,
    NARROWED,
    error,
    expected_logits,
    exported,
    padded,
    saved,
    stepped,
)
from tests.zeroed_models import Zeroed

KINDS = {
    "cohere2": 2, "deepseek_v3": 2, "dots1": 2, "ernie4_5_moe": 2, "exaone4": 2, "gemma2": 2,
    "bamba": 2, "gemma3_text": 2, "glm4_moe": 2, "granitemoehybrid": 2, "jamba": 4, "lfm2": 2,
    "lfm2_moe": 4, "mistral4": 2, "nemotron_h": 4, "olmo3": 2, "qwen3_5_moe_text": 2,
    "qwen3_5_text": 2,
    "qwen3_next": 3, "qwen2": 2, "qwen2_moe": 3, "qwen3": 2, "qwen3_moe": 2, "sliced_qwen2": 2,
    "sliced_qwen3": 2, "smollm3": 2,
}  # fmt: skip
"""Kinds of blocks in the tiny model of a family, where there is more than one."""


def shapes(graph: Path) -> dict[str, list[int]]:
    model = onnx.load(graph, load_external_data=False).graph
    return {tensor.name: list(tensor.dims) for tensor in model.initializer}


def caches(graph: Path) -> dict[str, list[Any]]:
    model = onnx.load(graph, load_external_data=False).graph
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.input
        if value.name.startswith("past_key_values")
    }


def agrees(path: Path, graph: Path, **options: Any) -> float:
    """How far cached steps of the engine are from PyTorch's logits of the wide checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids, mask = padded(model.config.vocab_size)
    with OrtRunner(graph, MACHINE, **options) as runner:
        return error(stepped(runner, ids, mask), expected_logits(model, ids, mask), mask)


def zero_everything(model: Zeroed) -> None:
    """Other channels in every block, heads, groups, whole sub-blocks: all that can be trimmed."""
    arch = model.arch
    for layer in range(arch.layers):
        if any(tensor.role == "down" for tensor in arch.block(layer)):
            model.channels(layer, range(3 + layer))
    attends = [layer for layer in range(arch.layers) if f"kv.{layer}" in arch.sizes]
    kv, heads = arch.sizes[f"kv.{attends[1]}"], arch.sizes.get(f"group.{attends[1]}", 1)
    model.heads(attends[1], [(kv - 1, head) for head in range(heads)])
    if len(attends) > 2 and f"group.{attends[2]}" in arch.sizes:
        model.heads(attends[2], [(0, 1), (1, 0)])
    for layer, role in ((0, "o"), (4, "o"), (3, "down"), (4, "down")):
        for own in (role, "linear.out") if role == "o" else (role,):
            model.whole(layer, own, bias=layer != 0)
    if any(tensor.role == "expert.down" for tensor in arch.block(1)):
        model.channels(1, range(5), expert=0)
        model.channels(1, range(9), expert=1)
        last = max(int(axis.split(".")[1]) for axis in arch.sizes if axis.startswith("expert."))
        every = range(arch.sizes[f"expert.{last}"])
        for expert, layer in ((2, 1), *((expert, last) for expert in every)):
            model.channels(layer, range(arch.sizes[f"moe.{layer}.{expert}"]), expert=expert)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [one for one in FAMILIES if one.values[0] in NARROWED])
def test_a_wide_family_becomes_a_narrow_engine(model_type: str, tmp_path: Path) -> None:
    """Also that the family's graph computes the same: the others' are in test_onnx.py."""
    saved(model_type, tmp_path / "wide")
    model = Zeroed(tmp_path / "wide")
    zero_everything(model)
    model.save()
    record = exported(Onnx(), tmp_path / "wide", tmp_path / "onnx")
    graph = tmp_path / "onnx" / record.graph
    assert agrees(tmp_path / "wide", graph) < 1e-5
    both = model_type == "falcon_h1"  # whose blocks have two mixers each
    assert f"{4 if both else 2} attention" in record.notes[1]
    assert record.notes[0] == f"{KINDS.get(model_type, 1)} of 6 blocks traced"
    in_blocks = sum(prod(model.arch.shape(t)) for t in model.arch.tensors if t.layer is not None)
    stamped = sum(prod(dims) for name, dims in shapes(graph).items() if ".4." not in name)
    # Of experts that are one tensor on disk nothing is trimmed.
    share = 0.96 if "fused" in model.arch.table.axes else 0.95
    assert stamped < share * (model.arch.parameters() - in_blocks / 6)
    hybrid = any(tensor.role == "linear.out" for tensor in model.arch.tensors)
    mixers = {tensor.layer for tensor in model.arch.tensors if tensor.role in ("o", "linear.out")}
    numbers = mixers - {0, 4} if hybrid else set(range(4))  # those with states have the block's
    assert {int(name.split(".")[1]) for name in caches(graph)} == numbers, "there are gaps"
    onnx.checker.check_model(str(graph), full_check=True)


@pytest.mark.slow
def test_experts_without_a_gate_are_narrowed(tmp_path: Path) -> None:
    kinds = ["moe", "full_attention", "moe", "linear_attention"]
    saved("nemotron_h", tmp_path / "wide", layers_block_type=kinds)
    model = Zeroed(tmp_path / "wide")
    model.channels(0, range(5), expert=1)
    model.channels(2, range(16), expert=0)
    model.save()
    record = exported(Onnx(), tmp_path / "wide", tmp_path / "onnx")
    graph = tmp_path / "onnx" / record.graph
    assert agrees(tmp_path / "wide", graph) < 1e-5
    own = shapes(graph)
    assert sorted(dims[1] for name, dims in own.items() if name.endswith("up_proj.1")) == [11, 16]
    assert not any(name.startswith("model.layers.2") and name.endswith("up_proj.0") for name in own)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Zeroed, Path, Any]:
    """A llama with zeroed structure, its directory (`wide`, `onnx`) and the export's record."""
    path = tmp_path_factory.mktemp("trim")
    saved("llama", path / "wide", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    model = Zeroed(path / "wide")
    model.channels(0, range(7))
    model.channels(1, range(40, 48))
    model.heads(1, [(2, 0), (2, 1)])
    model.heads(2, [(0, 1), (1, 0), (2, 0), (3, 1)])
    model.heads(3, [(0, 1), (1, 0), (2, 0)])
    model.whole(4, "o", bias=True)
    model.whole(5, "o", bias=True)
    model.whole(5, "down", bias=True)
    model.save()
    return model, path, exported(Onnx(), path / "wide", path / "onnx")


@pytest.mark.slow
def test_every_block_has_the_shapes_that_are_left_of_it(llama: Any) -> None:
    _, path, record = llama
    graph = path / "onnx" / record.graph
    found = shapes(graph)
    qkv = "self_attn.q_proj+k_proj+v_proj.weight"
    assert found[f"model.layers.0.{qkv}"] == [32, (8 + 4 + 4) * 8]
    assert found[f"model.layers.1.{qkv}"] == [32, (6 + 3 + 3) * 8]
    assert found[f"model.layers.2.{qkv}"] == [32, (4 + 4 + 4) * 8]
    # Its last group has both heads, so that the others keep a dead one.
    assert found[f"model.layers.3.{qkv}"] == [32, (8 + 4 + 4) * 8]
    assert found["model.layers.0.mlp.down_proj.weight"] == [41, 32]
    assert found["model.layers.1.mlp.gate_proj+up_proj.weight"] == [32, 2 * 40]
    assert not [name for name in found if name.startswith("model.layers.4.self_attn")]
    assert not [name for name in found if ".5." in name], "block 5 adds nothing and is not there"
    assert [dims[1] for dims in caches(graph).values()] == [4, 4, 3, 3, 4, 4, 4, 4]
    assert record.notes[1] == "trimmed: 2 attention, 1 mlp, 6 heads, 15 channels"


@pytest.mark.slow
def test_a_step_reads_only_what_is_left(llama: Any) -> None:
    model, _, record = llama
    whole = {layer: sum(prod(model.arch.shape(t)) for t in model.arch.block(layer))
             for layer in range(6)}  # fmt: skip
    norm, head = 32, 8 * 32
    gone = {
        0: 7 * 3 * 32,
        1: 8 * 3 * 32 + (2 * 2 + 2) * head,  # of two heads q and o, of their group k and v
        2: 4 * 2 * head,
        3: 0,
        4: (8 + 8 + 4 + 4) * head + norm,
        5: whole[5],
    }
    outside = 64 * 32 + norm  # the head and the last norm: the embedding is looked up
    assert record.weight_bytes == 4 * (sum(whole.values()) - sum(gone.values()) + outside)


def test_the_narrow_engine_computes_what_the_wide_model_does(llama: Any) -> None:
    _, path, record = llama
    assert agrees(path / "wide", path / "onnx" / record.graph) < 1e-5


@pytest.mark.slow
def test_a_model_without_attention_needs_no_cache(tmp_path: Path) -> None:
    saved("llama", tmp_path / "wide", num_hidden_layers=2)
    model = Zeroed(tmp_path / "wide")
    for layer in range(2):
        model.whole(layer, "o", bias=True)
    model.save()
    record = exported(Onnx(), tmp_path / "wide", tmp_path / "onnx")
    assert not caches(tmp_path / "onnx" / record.graph)
    assert agrees(tmp_path / "wide", tmp_path / "onnx" / record.graph) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_int8_rounds_what_is_left(model_type: str, tmp_path: Path) -> None:
    """The export compares with PyTorch, whose weights are rounded as they are stored."""
    saved(model_type, tmp_path / "wide", tie_word_embeddings=True)
    model = Zeroed(tmp_path / "wide")
    zero_everything(model)
    model.save()
    record = exported(Onnx(precision="int8"), tmp_path / "wide", tmp_path / "int8")
    assert record.notes[1].startswith("trimmed: 2 attention")
    plain = exported(Onnx(precision="fp16"), tmp_path / "wide", tmp_path / "fp16")
    assert record.weight_bytes < plain.weight_bytes


@pytest.mark.slow
def test_thirty_widths_are_one_trace(tmp_path: Path) -> None:
    saved("llama", tmp_path / "wide", num_hidden_layers=30)
    model = Zeroed(tmp_path / "wide")
    for layer in range(30):
        model.tensors[model.tensor("o", layer).name] *= (
            0.2  # thirty random blocks magnify roundings
        )
        model.tensors[model.tensor("down", layer).name] *= 0.2
        model.channels(layer, range(layer))
    model.save()
    record = exported(Onnx(), tmp_path / "wide", tmp_path / "onnx")
    assert record.notes[0] == "1 of 30 blocks traced"
    widths = [
        shapes(tmp_path / "onnx" / record.graph)[f"model.layers.{layer}.mlp.down_proj.weight"][0]
        for layer in range(30)
    ]
    assert widths == [48 - layer for layer in range(30)]


def test_a_norm_over_all_heads_keeps_them(tmp_path: Path) -> None:
    saved("olmo2", tmp_path / "wide")
    model = Zeroed(tmp_path / "wide")
    model.heads(1, [(0, 0), (0, 1)])
    model.heads(2, [(0, 0), (1, 1)])
    model.save()
    found = Trim.of(Checkpoint.open(tmp_path / "wide"))
    assert not found
    assert not found.note()


def test_a_sparse_projection_keeps_its_dead_channels(tmp_path: Path) -> None:
    """A cut would shift the groups of 2 of 4; whole sub-blocks go all the same."""
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("down_proj.weight"):
            for first in range(4):
                tensor[0::2, first::4] *= first in (0, 3)
                tensor[1::2, first::4] *= first in (1, 2)
            tensor[:, 4] = 0
    tensors["model.layers.3.mlp.down_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    trim = Trim.of(Checkpoint.open(tmp_path))
    assert not trim.keep
    assert trim.dead == {"model.layers.3.mlp.down_proj.weight"}
