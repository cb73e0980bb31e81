"""Graphs in fp16, bf16 and int8: what they round, and that it is all that they change."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.onnx.coding import dequantize, quantize
from tests.exporters.onnx.graphs import (
    MACHINE,
    error,
    expected_logits,
    exported,
    padded,
    saved,
    stepped,
)


@pytest.mark.slow
def test_half_precision_is_run_and_rounds_little(llama: Any, tmp_path: Path) -> None:
    model, path, record = llama
    half = exported(Onnx(precision="fp16"), path / "dense", tmp_path / "half")
    assert half.weight_bytes * 2 == record.weight_bytes
    graph = onnx.load(tmp_path / "half" / "model.onnx", load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["RotaryEmbedding"] == 2 * model.config.num_hidden_layers
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "half", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert 1e-7 < error(got, expected_logits(model, ids, mask), mask) < 2e-2


@pytest.mark.slow
def test_bfloat16_says_that_it_was_not_run(llama: Any, tmp_path: Path) -> None:
    _, path, _ = llama
    record = exported(Onnx(precision="bf16"), path / "dense", tmp_path / "brain")
    assert "checked as a graph only" in record.notes[1]
    graph = onnx.load(tmp_path / "brain" / "model.onnx").graph
    types = {weight.data_type for weight in graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types
    assert graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    # TensorRT's way on a machine with a GPU, beside an onnxruntime that has no provider for it.
    gpu = replace(MACHINE, device="cuda")
    told = Onnx(precision="bf16")._compared(tmp_path / "brain", None, None, None, gpu)
    assert "checked as a graph only" in told


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=pytest.mark.slow) for t in ("llama", "gpt2", "mixtral")]
)
def test_int8_is_smaller_and_exact_but_for_its_rounding(model_type: str, tmp_path: Path) -> None:
    model = saved(model_type, tmp_path / "dense", tie_word_embeddings=True)
    record = exported(Onnx(precision="int8"), tmp_path / "dense", tmp_path / "int8")
    dense = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert record.weight_bytes < 0.5 * dense
    graph = onnx.load(tmp_path / "int8" / "model.onnx", load_external_data=False).graph
    assert {node.domain for node in graph.node} == {""}
    ids, mask = padded(model.config.vocab_size)
    with OrtRunner(tmp_path / "int8" / "model.onnx", MACHINE, fuse=False) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) > 1e-4
    round_matrices(model)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5


def round_matrices(model: PreTrainedModel) -> None:
    """Rounds every matrix as int8 does, but for the embedding and the experts' routers."""

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        """`[inputs, outputs]`, in blocks of 32 inputs."""
        return dequantize(*quantize(matrix, 32), 32)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(rounded(module.weight.T).T.contiguous())
            elif isinstance(module, Conv1D):
                module.weight.copy_(rounded(module.weight))
            elif hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3:
                for stack in (module.gate_up_proj, module.down_proj):
                    stack.copy_(torch.stack([rounded(expert.T).T for expert in stack]))
