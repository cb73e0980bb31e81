"""The codes of a quantized checkpoint reach the portable graph as they are, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.errors import CheckpointError
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.onnx.coding import dequantize, quantize
from prune_export.quantize.gptq import Gptq
from prune_export.quantize.rtn import Rtn
from tests.exporters.onnx.graphs import MACHINE, exported, saved
from tests.exporters.ort_genai.test_codes import quantized

CASES: dict[str, tuple[str, Gptq | Rtn]] = {
    "asymmetric, joined products": ("llama", Gptq(group_size=16)),
    "stored [in, out]": ("gpt2", Rtn(group_size=32)),
    "experts": ("mixtral", Rtn(symmetric=True)),
    "8 bits": ("qwen3", Gptq(bits=8, symmetric=True)),
    "8 bits, asymmetric": ("gemma3_text", Rtn(bits=8, group_size=16)),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_the_engine_computes_what_the_checkpoint_does(case: str, tmp_path: Path) -> None:
    family, method = CASES[case]
    saved(family, tmp_path / "dense")
    after = quantized(tmp_path / "dense", tmp_path / "codes", method)
    exporter = Onnx(precision="int4" if method.bits == 4 else "int8", accuracy_level=1)
    record = exported(exporter, after.path, tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(after.path).eval()
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 9))
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        own = torch.nn.Parameter(dequantize(*quantize(head.T, 32), 32).T.contiguous())
        model.get_output_embeddings().weight = own  # the head is rounded apart
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    with exporter.open(tmp_path / "onnx", MACHINE) as runner:
        got, _ = runner.step(ids)
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    graph = onnx.load(tmp_path / "onnx" / record.graph, load_external_data=False)
    onnx.checker.check_model(str(tmp_path / "onnx" / record.graph), full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    assert _bits(graph) == ({4, 8} if method.bits == 4 else {8})


@pytest.mark.slow
def test_weights_that_were_changed_since_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    after = quantized(tmp_path / "dense", tmp_path / "codes", Rtn(include=("down",)))
    (tmp_path / "dense" / "quantization.grid").write_bytes(
        (after.path / "quantization.grid").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"down_proj\.weight[\s\S]*steps off its grid"):
        exported(Onnx(precision="int4"), tmp_path / "dense", tmp_path / "onnx")


@pytest.mark.slow
def test_without_a_grid_int4_is_rounded_to_nearest(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    exporter = Onnx(precision="int4", block_size=16, head="int8")
    record = exported(exporter, tmp_path / "dense", tmp_path / "onnx")
    graph = onnx.load(tmp_path / "onnx" / record.graph, load_external_data=False)
    assert _bits(graph) == {4, 8}
    blocks = {
        attribute.i
        for node in graph.graph.node
        if node.op_type == "DequantizeLinear"
        for attribute in node.attribute
        if attribute.name == "block_size"
    }
    assert blocks == {16}


def _bits(graph: Any) -> set[int]:
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    read = [node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"]
    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    return {4 if kinds[name] in four else 8 for name in read}
