"""8 bits: products stay close, zeros stay zero, outliers are left alone, losses are measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from prune_export.calibrate import TokenSet
from prune_export.exporters.tensorrt.calibration import calibration
from prune_export.exporters.tensorrt.quantize import (
    Range,
    kl,
    last_logits,
    observed,
    quantize,
    ranges,
)
from prune_export.sparsity.onnx_weights import load, matrices


def one_product(path: Path, weight: np.ndarray) -> Path:
    """A graph of one product in a block, `x` `[tokens, inputs]` of the weight's type."""
    node = onnx.helper.make_node("MatMul", ["x", "model.layers.0.w"], ["y"], "product")
    info = onnx.helper.make_tensor_value_info
    kind = onnx.helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = onnx.helper.make_graph(
        [node], "g", [info("x", kind, ["tokens", weight.shape[0]])],
        [info("y", kind, ["tokens", weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "model.layers.0.w")],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10
    )
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}_data",
              size_threshold=0)  # fmt: skip
    return path


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.06)])
def test_a_product_in_8_bits_is_close_and_keeps_its_zeros(
    kind: Any, bound: float, tmp_path: Path
) -> None:
    import onnxruntime

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    weight[::2] = 0
    x = rng.standard_normal((7, 64)).astype(np.float32)
    graph = one_product(tmp_path / "model.onnx", weight)
    done = quantize(graph, kind, {"x": Range(float(np.abs(x).max()), 1.0)})
    assert (done.products, done.activations, done.left) == (1, 1, 0)
    assert done.saved_bytes == 64 * 48 * 3 - 48 * 4
    onnx.checker.check_model(str(graph), full_check=True)
    (matrix,) = matrices(load(graph), tmp_path)
    assert not matrix.nonzero()[weight == 0].any()
    plain = onnxruntime.SessionOptions()  # its own fusion of 8-bit products rounds otherwise
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(graph), plain, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x})
    wanted = x @ weight
    assert 0 < np.abs(got - wanted).max() / np.abs(wanted).max() < bound


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("top", [0.0, 1e-6, 3e-3])
def test_no_scale_is_zero_however_small_an_activation(
    kind: Any, top: float, tmp_path: Path
) -> None:
    """float16 has no 1e-6 / 127, and TensorRT refuses a scale of zero."""
    graph = one_product(tmp_path / "model.onnx", np.ones((8, 8), np.float16))
    quantize(graph, kind, {"x": Range(top, 1.0)})
    scales = {one.name: onnx.numpy_helper.to_array(one) for one in load(graph).graph.initializer
              if one.name.endswith("/scale")}  # fmt: skip
    assert len(scales) == 2
    assert all((scale > 0).all() for scale in scales.values())


def test_the_loss_to_8_bits_is_measured(tiny_graph: Path, tmp_path: Path) -> None:
    for file in tiny_graph.parent.glob("model.onnx*"):
        shutil.copyfile(file, tmp_path / file.name)
    ids = np.random.default_rng(0).integers(0, 250, (4, 12))
    before = last_logits(tiny_graph, ids, 1)
    observed(tiny_graph, tiny_graph.with_name("observed.onnx"))
    reached = ranges(tiny_graph.with_name("observed.onnx"), ids, 1)
    quantize(tmp_path / "model.onnx", "fp8", reached)
    lost = kl(before, last_logits(tmp_path / "model.onnx", ids, 1))
    assert 0 < lost < 0.1
    assert kl(before, before) == 0
    a, b = np.log([[0.75, 0.25]]), np.log([[0.5, 0.5]])
    assert kl(a + 3, b) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))


def test_activations_are_measured_where_products_read_them(tiny_graph: Path) -> None:
    names = observed(tiny_graph, tiny_graph.with_name("observed.onnx"))
    assert len(names) == 4 * 6
    ids = np.random.default_rng(0).integers(0, 250, (3, 8))
    each = [ranges(tiny_graph.with_name("observed.onnx"), ids[at : at + 1], 1) for at in range(3)]
    whole = ranges(tiny_graph.with_name("observed.onnx"), ids, 1)
    assert whole.keys() == set(names)
    for name, one in whole.items():
        assert one.top == max(window[name].top for window in each) > 0
        squares = [window[name].rms ** 2 for window in each]
        assert one.rms == pytest.approx(np.sqrt(np.mean(squares)))
        assert one.rms < one.top


def test_a_product_with_outliers_is_left_as_it_is(tmp_path: Path) -> None:
    graph = one_product(tmp_path / "model.onnx", np.ones((64, 48), np.float32))
    before = graph.read_bytes()
    done = quantize(graph, "int8", {"x": Range(top=31.0, rms=1.0)})
    assert (done.products, done.left, done.saved_bytes) == (0, 1, 0)
    assert [node.op_type for node in onnx.load(graph).graph.node] == ["MatMul"]
    assert quantize(graph, "fp8", {"x": Range(top=31.0, rms=1.0)}).products == 1
    assert graph.read_bytes() != before


def test_calibration_data_come_before_built_in_text(tiny_llama: Path, tmp_path: Path) -> None:
    tokens = TokenSet.of(torch.arange(40).reshape(2, 20))
    ids, note = calibration(tiny_llama, tokens, 258)
    assert ids.tolist() == tokens.ids.tolist()
    assert note == "2 windows of 20 tokens of the recipe's calibration data"
    ids, note = calibration(tiny_llama, None, 258)
    assert ids.shape[0] == 1
    assert "the recipe has no calibration data" in note
    ids, note = calibration(tmp_path, None, 258)
    assert ids.max() < 258
    assert "no tokenizer" in note
