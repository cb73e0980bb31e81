"""Checkpoints of 8-bit and 4-bit floats are dequantized to the very bits of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from prune_export.checkpoint import Checkpoint, import_packed, packed, packed_in
from prune_export.errors import CheckpointError
from prune_export.execution import Options, plan, run
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from tests.checkpoint.tiny_wrappers import save_wrapper
from tests.saved_models import maker


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return maker(tmp_path_factory.mktemp)


def pack_fp8(source: Path, out: Path, block: tuple[int, int] | None, scale: str = "float") -> Path:
    """Stores the matrices of blocks as fp8; the values need not be near those of the model."""
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(1)
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() != 2 or ".layers." not in name or "router" in name or "mlp.gate." in name:
            tensors[name] = weight.bfloat16()
            continue
        tensors[name] = (weight * 20).to(torch.float8_e4m3fn)
        rows, columns = (-(-weight.shape[i] // block[i]) if block else 1 for i in (0, 1))
        scales = torch.rand(rows, columns) + 0.1 if block else torch.rand(()) + 0.1
        if scale == "ue8m0":
            scales = torch.randint(118, 124, (rows, columns)).to(torch.uint8)
        tensors[f"{name}_scale_inv"] = scales
        if not block:
            tensors[name.replace(".weight", ".activation_scale")] = torch.rand(())
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    how = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic" if block else "static",
        "weight_block_size": list(block) if block else None,
        "modules_to_not_convert": ["lm_head"],
    }
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": how}
    (out / "config.json").write_text(json.dumps(config))
    return out


def opened(path: Path, out: Path) -> Checkpoint:
    found = packed_in(path)
    assert found is not None
    made = import_packed(found, out)
    made.arch()
    assert "quantization_config" not in made.config
    return made


def state(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("model_type", "block"),
    [("qwen3", (16, 16)), ("deepseek_v3", (4, 4)), ("ministral3", None)],
)
def test_fp8_becomes_what_transformers_makes_of_it(
    saved: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    block: tuple[int, int] | None,
) -> None:
    monkeypatch.setattr(packed, "_PIECE_BYTES", 4096)  # so that matrices come in several pieces
    source = pack_fp8(saved(model_type), tmp_path / "fp8", block)
    opened(source, tmp_path / "plain")
    ours, theirs = state(tmp_path / "plain"), state(source)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype == torch.bfloat16 or "bias" in name
        assert torch.equal(value, theirs[name]), name


def test_the_last_block_of_a_matrix_may_be_cut_off(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    """As in DeepSeek-V3, whose latents have 576 rows in blocks of 128."""
    source = pack_fp8(saved("qwen3"), tmp_path / "fp8", (20, 12))
    made = opened(source, tmp_path / "plain")
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    weight, scales = stored[name].float(), stored[f"{name}_scale_inv"]
    for row in range(0, 32, 5):
        for column in range(0, 48, 7):
            expected = (weight[row, column] * scales[row // 20, column // 12]).bfloat16()
            assert made.read(name)[row, column] == expected


def test_scales_may_be_powers_of_two(saved: Callable[..., Path], tmp_path: Path) -> None:
    source = pack_fp8(saved("qwen3"), tmp_path / "fp8", (16, 16), "ue8m0")
    made = opened(source, tmp_path / "plain")
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    scale = 2.0 ** (float(stored[f"{name}_scale_inv"][1, 1]) - 127)
    assert torch.equal(
        made.read(name)[16:32, 16:32], (stored[name].float()[16:32, 16:32] * scale).bfloat16()
    )


def test_mxfp4_becomes_what_transformers_makes_of_it(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = saved("gpt_oss", intermediate_size=64, dtype="bfloat16"), tmp_path / "mxfp4"
    out.mkdir()
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(2)
    expected = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(100, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    how = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    made = opened(out, tmp_path / "plain")
    assert len(expected) == 12
    for name, value in expected.items():
        assert torch.equal(made.read(name), value), name
    theirs = state(out)
    for name, value in state(tmp_path / "plain").items():
        assert torch.equal(value, theirs[name]), name


def test_the_language_model_of_a_packed_wrapper(tmp_path: Path) -> None:
    plain = save_wrapper("mistral3", tmp_path / "plain")
    source = pack_fp8(plain.path, tmp_path / "fp8", None)
    found = packed_in(source)
    assert found is not None
    assert found.alone().arch().parameters() == Checkpoint.open(plain.path).arch().parameters()
    made = import_packed(found, tmp_path / "made")
    assert made.wrapped is not None
    assert made.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quant_method": "bitsandbytes"}, r"bitsandbytes.*\n.*dequantize\(\)"),
        ({"quant_method": "compressed-tensors"}, r"compressed-tensors.*\n.*dequantize=True"),
        ({"quant_method": "gptq", "bits": 4}, r"gptq.*\n.*unquantized model"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size\n.*two sizes"),
        ("fp8", r"unknown method"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_with_what_undoes_it(
    saved: Callable[..., Path], tmp_path: Path, how: Any, message: str
) -> None:
    config = json.loads((saved("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    with pytest.raises(CheckpointError, match=message):
        packed_in(tmp_path)


def test_weights_without_their_scales_are_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    source = pack_fp8(saved("qwen3"), tmp_path / "fp8", (16, 16))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    scales = tensors.pop(f"{name}_scale_inv")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj.weight\n.*without"):
        opened(source, tmp_path / "plain")
    tensors[f"{name}_scale_inv"] = torch.cat([scales] * 4)[:7]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"scale_inv\n.*\[7, 2\] for a weight \[48, 32\]"):
        opened(source, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"quantized \(fp8\).*\n.*dequantizes it first"):
        Checkpoint.open(source)


def test_a_run_dequantizes_first_and_the_plan_says_so(
    tiny_llama: Path, corpus: Path, tmp_path: Path, measured_here: None
) -> None:
    source = pack_fp8(tiny_llama, tmp_path / "fp8", (16, 16))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((tiny_llama / name).read_bytes())
    options = Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))
    text = "recipe: 1\ndescription: One block.\nstages: [{prune: {method: deepest, remove: 1}}]\n"
    recipe = Recipe.parse(text, root=corpus)
    planned = plan(recipe, str(source), options)
    assert "weights are fp8: they are dequantized first" in planned.notes[0]
    first = planned.stages[0]
    assert (first.kind, first.name) == ("import", "fp8")
    assert first.note == "dequantized once to bfloat16"
    run(recipe, str(source), options)
    made = Checkpoint.open(tmp_path / "out")
    assert made.arch().layers == 5
    assert made.dtype == "bfloat16"
