"""Codes in GPTQ's layout: packed as it is published, and computing what the checkpoint does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_export.contracts import Work
from prune_export.errors import CheckpointError, PlanError
from prune_export.exporters.gptq_format import GptqFormat
from prune_export.progress import Silent
from prune_export.quantize.gptq import Gptq
from prune_export.quantize.rtn import Rtn
from tests.exporters.onnx.graphs import MACHINE, saved
from tests.exporters.ort_genai.test_codes import quantized


def written(source: Path, out: Path) -> Any:
    out.mkdir()
    return GptqFormat().export(source, out, Work(MACHINE, Silent(), out.parent))


def by_hand(parts: dict[str, torch.Tensor], bits: int, added: int) -> np.ndarray:
    """One weight after the other, as the layout is described."""
    words, zeros = parts["qweight"].numpy().view(np.uint32), parts["qzeros"].numpy().view(np.uint32)
    inputs, outputs, each = len(parts["g_idx"]), words.shape[1], 32 // bits
    found = np.empty((outputs, inputs), np.float32)
    for i in range(inputs):
        group = int(parts["g_idx"][i])
        for o in range(outputs):
            code = int(words[i // each, o]) >> (bits * (i % each)) & (2**bits - 1)
            zero = (int(zeros[group, o // each]) >> (bits * (o % each)) & (2**bits - 1)) + added
            found[o, i] = (code - zero) * float(parts["scales"][group, o])
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_layout_holds_the_checkpoint_s_weights(
    bits: int, symmetric: bool, tmp_path: Path
) -> None:
    saved("llama", tmp_path / "dense")
    method = Rtn(bits=bits, symmetric=symmetric, group_size=16)  # type: ignore[arg-type]
    after = quantized(tmp_path / "dense", tmp_path / "codes", method)
    written(after.path, tmp_path / "gptq")
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    about = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "gptq"
    assert about["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    stems = [name.removesuffix("qweight") for name in stored if name.endswith("qweight")]
    assert len(stems) == sum(name.endswith("proj.weight") for name in after.entries)
    for stem in stems[:3]:
        parts = {part: stored[stem + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert parts["scales"].dtype == torch.float16
        weight = after.read(f"{stem}weight").numpy()
        assert np.array_equal(by_hand(parts, bits, int(symmetric)), weight)


def test_the_engine_computes_what_the_checkpoint_does(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "dense")
    after = quantized(tmp_path / "dense", tmp_path / "codes", Gptq(group_size=16, exclude=("o",)))
    record = written(after.path, tmp_path / "gptq")
    assert "format gptq_v2" in record.notes[0]
    about = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert about["dynamic"] == {"-:.*o_proj.*": {}}
    model = AutoModelForCausalLM.from_pretrained(after.path).eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    with GptqFormat().open(tmp_path / "gptq", MACHINE) as runner:
        got = np.concatenate([runner.step(ids[:, :5])[0], runner.step(ids[:, 5:])[0]], axis=1)
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="has no grids"):
        written(tmp_path / "dense", tmp_path / "one")
    after = quantized(tmp_path / "dense", tmp_path / "codes", Rtn(group_size=256))
    with pytest.raises(CheckpointError, match="does not fit GPTQ's layout"):
        written(after.path, tmp_path / "two")
    for family in ("gpt2", "mixtral"):
        saved(family, tmp_path / family)
        from prune_export.checkpoint import Checkpoint

        with pytest.raises(PlanError, match="loaders of the layout do not expect"):
            GptqFormat().check(Checkpoint.open(tmp_path / family).arch(), MACHINE)


def test_what_controls_a_recurrence_is_told_to_have_no_codes(tmp_path: Path) -> None:
    """As loaders would look for codes of every linear layer of a block."""
    saved("qwen3_5_text", tmp_path / "dense", linear_value_head_dim=8, linear_key_head_dim=8)
    after = quantized(tmp_path / "dense", tmp_path / "codes", Rtn(group_size=16))
    written(after.path, tmp_path / "gptq")
    about = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert about["dynamic"] == {"-:.*in_proj_a.*": {}, "-:.*in_proj_b.*": {}}
    model = AutoModelForCausalLM.from_pretrained(after.path).eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    with GptqFormat().open(tmp_path / "gptq", MACHINE) as runner:
        got = runner.step(ids)[0]
    np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=1e-4)
