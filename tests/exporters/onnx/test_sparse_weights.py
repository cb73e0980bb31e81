"""Patterns of zeros pass through quantized exports: every zero is stored as an exact zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from prune_export.exporters.onnx import Onnx
from prune_export.exporters.ort_genai import OrtGenai
from tests.exporters.onnx.graphs import exported, saved
from tests.exporters.ort_genai.test_ort_genai import export, model_in

KEEP, OF = 2, 4


def thinned(folder: Path, *, transposed: bool = False) -> None:
    """Leaves the two largest of four neighbouring inputs in every matrix of the blocks."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and (".layers." in name or ".h." in name):
            rows = tensor.T if transposed else tensor  # [out, in]
            groups = rows.reshape(-1, OF)
            least = groups.abs().argsort(dim=1)[:, : OF - KEEP]
            zeroed = groups.scatter(1, least, 0).view_as(rows)
            tensors[name] = (zeroed.T if transposed else zeroed).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def most_kept(columns: np.ndarray) -> int:
    """The most weights that are not zero in a group, of `[in, out]`."""
    groups = columns.reshape(-1, OF, columns.shape[1])
    return int(np.count_nonzero(groups, axis=1).max())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_int8_of_the_portable_graph(model_type: str, tmp_path: Path) -> None:
    saved(model_type, tmp_path / "model", tie_word_embeddings=False)
    thinned(tmp_path / "model", transposed=model_type == "gpt2")
    exported(Onnx(precision="int8"), tmp_path / "model", tmp_path / "int8")
    graph = onnx.load(tmp_path / "int8" / "model.onnx").graph
    found = {
        weight.name: most_kept(numpy_helper.to_array(weight))
        for weight in graph.initializer
        if weight.name.endswith("_int8")
    }
    inside = {name: most for name, most in found.items() if "head" not in name}
    assert len(inside) >= 2 * 4
    assert set(inside.values()) == {KEEP}
    dense = [most for name, most in found.items() if "head" in name]
    assert dense == [OF]


@pytest.mark.usefixtures("genai_in_this_process")
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_onnxruntime_genai(precision: Any, tmp_path: Path) -> None:
    model_in(tmp_path / "model", "Llama", {"tie_word_embeddings": False})
    thinned(tmp_path / "model")
    export(OrtGenai(precision=precision), tmp_path / "model", tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    stored = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    found = {
        node.name: most_kept(_steps(node, stored))
        for node in graph.node
        if node.op_type == "MatMulNBits"
    }
    inside = {name: most for name, most in found.items() if "head" not in name}
    assert len(inside) >= 3 * 4
    assert set(inside.values()) == {KEEP}


def _steps(node: onnx.NodeProto, stored: dict[str, np.ndarray]) -> np.ndarray:
    """A MatMulNBits' weight `[in, out]` in steps from its zero point."""
    own = {attribute.name: attribute.i for attribute in node.attribute}
    packed = stored[node.input[1]]  # [out, blocks, bytes of a block]
    if own["bits"] == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    zero: Any = 1 << (own["bits"] - 1)
    if len(node.input) > 3 and node.input[3]:
        points = stored[node.input[3]].reshape(len(packed), -1)
        if own["bits"] == 4:
            points = np.stack([points & 15, points >> 4], axis=-1).reshape(len(packed), -1)
        zero = points[:, : packed.shape[1], None]
    steps = packed.astype(np.int16) - zero
    return steps.reshape(len(packed), -1)[:, : own["K"]].T
