"""Sliding windows in a graph: the same numbers in ONNX Runtime, and every weight 2 of 4."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_export.errors import PlanError
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.onnx.slidesparse import Slid, slide
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import load, matrices
from prune_export.sparsity.slidesparse import holds


def sparse(inputs: int, outputs: int, nm: Nm | None, seed: int = 0) -> np.ndarray:
    """float32 `[inputs, outputs]` of the pattern."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((inputs, outputs)).astype(np.float32)
    if nm is None:
        return values
    groups = -(-inputs // nm.of)
    order = rng.random((groups, nm.of, outputs)).argsort(axis=1).argsort(axis=1)
    return values * (order < nm.keep).reshape(-1, outputs)[:inputs]


def written(
    nodes: list[Any], weights: dict[str, np.ndarray], path: Path, inputs: int, outputs: int = 96
) -> Path:
    """A graph from `x` `[batch, inputs]` to `y`, its large weights external."""
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", outputs])], tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(
        model, str(path / "model.onnx"), save_as_external_data=True, location="model.onnx_data",
        size_threshold=512,
    )  # fmt: skip
    return path / "model.onnx"


def computed(graph: Path, inputs: int) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((7, inputs)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    return y


def rewritten(graph: Path, inputs: int) -> Slid:
    """Slides the graph, and checks that it is a valid one and computes the same."""
    before = computed(graph, inputs)
    slid = slide(graph)
    onnx.checker.check_model(str(graph), full_check=True)
    after = computed(graph, inputs)
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    return slid


@pytest.mark.parametrize("nm", [Nm(4, 6), Nm(6, 8), Nm(4, 8), Nm(8, 10), Nm(12, 14)], ids=str)
@pytest.mark.parametrize("outputs", [48, 41])
@pytest.mark.parametrize("gemm", [False, True], ids=["MatMul", "Gemm"])
def test_a_product_computes_the_same(nm: Nm, outputs: int, gemm: bool, tmp_path: Path) -> None:
    weight = sparse(83, outputs, nm)
    bias = np.arange(outputs, dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    if gemm:
        node = helper.make_node("Gemm", ["x", "w", "bias"], ["y"], "product", transB=1)
        weight = np.ascontiguousarray(weight.T)
    graph = written([node], {"w": weight, "bias": bias}, tmp_path, 83, outputs)
    slid = rewritten(graph, 83)
    assert list(slid.rewritten) == ["w"]
    assert [m.shape[0] % 32 for m in matrices(load(graph), tmp_path)] == [0]
    assert all(holds(m.nonzero(), Nm(2, 4)) for m in matrices(load(graph), tmp_path))


def test_products_of_one_activation_share_a_gather(tmp_path: Path) -> None:
    def product(weight: str, source: str = "x") -> Any:
        return helper.make_node("MatMul", [source, weight], [f"by_{weight}"], weight)

    nodes = [
        *map(product, ("q", "k", "dense", "ready", "other")),
        helper.make_node("Sum", [f"by_{w}" for w in ("q", "k", "dense", "ready", "other")], ["s"]),
        product("last", "s"),
        helper.make_node("Identity", ["by_last"], ["y"]),
    ]
    weights = {
        "q": sparse(96, 96, Nm(6, 8), 1), "k": sparse(96, 96, Nm(4, 8), 2),
        "dense": sparse(96, 96, None, 3), "ready": sparse(96, 96, Nm(2, 4), 4),
        "other": sparse(96, 96, Nm(4, 6), 5), "last": sparse(96, 96, Nm(6, 8), 6),
    }  # fmt: skip
    graph = written(nodes, weights, tmp_path, 96)
    slid = rewritten(graph, 96)
    assert slid.gathers == 3  # x in windows of 8 and of 6, s in windows of 8
    kinds = Counter(node.op_type for node in load(graph).graph.node)
    assert kinds["Gather"] == 3
    assert slid.rewritten == {"q": Nm(6, 8), "k": Nm(6, 8), "other": Nm(4, 6), "last": Nm(6, 8)}
    assert (slid.ready, slid.half) == (("ready",), ("k",))
    assert slid.added_bytes == 4 * 96 * (3 * (160 - 96) + (128 - 96))
    notes = "\n".join(slid.notes())
    assert "3 weights hold 6 of 8 and became 2 of 4, at most 1.33x" in notes
    assert "1 weights hold 4 of 6 and became 2 of 4, at most 1.50x" in notes
    assert "1 weights hold 4 of 8, which needs the windows of 6 of 8" in notes
    held = {m.name: holds(m.nonzero(), Nm(2, 4)) for m in matrices(load(graph), tmp_path)}
    assert held == {name: name != "dense" for name in weights}


def test_a_weight_that_something_else_reads_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("ReduceSum", ["w"], ["total"], keepdims=0),
        helper.make_node("Add", ["a", "total"], ["y"]),
    ]
    graph = written(nodes, {"w": sparse(96, 96, Nm(6, 8))}, tmp_path, 96)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    slid = rewritten(graph, 96)
    assert not slid.rewritten
    assert slid.notes() == (
        "sliding windows: nothing to do, no weight holds a pattern that it can rewrite",
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_weight_that_two_kinds_of_product_read_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("Gemm", ["a", "w"], ["y"], "other", transB=1),
    ]
    graph = written(nodes, {"w": sparse(96, 96, Nm(6, 8))}, tmp_path, 96)
    assert not rewritten(graph, 96).rewritten


def test_a_weight_of_two_products_is_rewritten_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "product"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "other"),
    ]
    graph = written(nodes, {"w": sparse(96, 96, Nm(6, 8))}, tmp_path, 96)
    slid = rewritten(graph, 96)
    assert (list(slid.rewritten), slid.gathers) == (["w"], 2)
    assert slid.added_bytes == 4 * 96 * (160 - 96)


def test_int8_and_sliding_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="multiplies in fp32\n  write `precision: fp16`"):
        Onnx(precision="int8", sliding=True)
