"""Zeros of a graph's weights, through every way in which they may be stored; patterns counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prune_export.errors import CheckpointError
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import array_of, load, matrices, nonzero
from prune_export.sparsity.patterns import Achieved, pattern_held, patterns

RNG = np.random.default_rng(0)
MASK = RNG.random((24, 10)) < 0.5
VALUES = (RNG.integers(1, 100, MASK.shape) * MASK).astype(np.float32)


def graph(nodes: list[Any], constants: dict[str, Any], domain: str = "") -> Any:
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    info = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, ["n", 24])],
        [info("y", TensorProto.FLOAT, ["n", 10])], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def only(model: Any, folder: Path = Path()) -> Any:
    (found,) = matrices(model, folder)
    return found


def node(kind: str, *read: str, out: str = "y", **given: Any) -> Any:
    return helper.make_node(kind, list(read), [out], f"the {kind}", **given)


WAYS = {
    "MatMul": ([node("MatMul", "x", "w")], {"w": VALUES}),
    "Gemm": ([node("Gemm", "x", "w", transB=1)], {"w": VALUES.T.copy()}),
    "Transpose": (
        [node("Transpose", "w", out="t", perm=[1, 0]), node("MatMul", "x", "t")],
        {"w": VALUES.T.copy()},
    ),
    "Transpose and Gemm": (
        [node("Transpose", "w", out="t", perm=[1, 0]), node("Gemm", "x", "t", transB=1)],
        {"w": VALUES},
    ),
    "Cast": (
        [node("Cast", "w", out="c", to=TensorProto.FLOAT), node("MatMul", "x", "c")],
        {"w": VALUES.astype(np.float16)},
    ),
    "bfloat16": (
        [node("Cast", "w", out="c", to=TensorProto.FLOAT), node("MatMul", "x", "c")],
        {"w": VALUES.astype(ml_dtypes.bfloat16)},
    ),
    "float8, with negative zeros": (
        [node("DequantizeLinear", "w", "s", out="d"), node("MatMul", "x", "d")],
        {"w": np.where(MASK, 1.0, -0.0).astype(ml_dtypes.float8_e4m3fn),
         "s": np.array(0.5, np.float32)},
    ),
    "QuantizeLinear and back": (
        [node("QuantizeLinear", "w", "s", out="q"), node("DequantizeLinear", "q", "s", out="d"),
         node("MatMul", "x", "d")],
        {"w": VALUES, "s": np.array(0.5, np.float32)},
    ),
    "int8 by column": (
        [node("DequantizeLinear", "w", "s", out="d", axis=1), node("MatMul", "x", "d")],
        {"w": VALUES.astype(np.int8), "s": np.ones(10, np.float32)},
    ),
    "uint8 with zero points by column": (
        [node("DequantizeLinear", "w", "s", "z", out="d", axis=1), node("MatMul", "x", "d")],
        {"w": (VALUES + np.arange(10)).astype(np.uint8), "s": np.ones(10, np.float32),
         "z": np.arange(10).astype(np.uint8)},
    ),
    "uint8 with zero points by row": (
        [node("DequantizeLinear", "w", "s", "z", out="d", axis=0), node("MatMul", "x", "d")],
        {"w": (VALUES + np.arange(24)[:, None]).astype(np.uint8), "s": np.ones(24, np.float32),
         "z": np.arange(24).astype(np.uint8)},
    ),
    "uint8 with zero points by block": (
        [node("DequantizeLinear", "w", "s", "z", out="d", axis=0, block_size=16),
         node("MatMul", "x", "d")],
        {"w": (VALUES + np.repeat([[3], [5]], 16, 0)[:24]).astype(np.uint8),
         "s": np.ones((2, 10), np.float32), "z": np.repeat([[3], [5]], 10, 1).astype(np.uint8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_zeros_are_found_behind(way: str) -> None:
    nodes, constants = WAYS[way]
    found = only(graph(nodes, constants))
    assert found.name == "w"
    assert found.shape == (24, 10)
    assert (found.nonzero() == MASK).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", [False, True])
def test_zeros_of_onnx_runtimes_own_product(bits: int, points: bool) -> None:
    """uint8 `[out, blocks, bytes]`: quantized and packed here by hand, two blocks of 16."""
    zero = np.full((10, 2), 1 << (bits - 1))
    if points:
        zero = np.stack([np.arange(10), np.arange(10) + 1], 1)
    stored = np.zeros((10, 32), np.uint8)
    stored[:, :24] = np.where(MASK.T, 15, 0)
    wide = np.repeat(zero, 16, axis=1)
    stored = np.where(np.pad(MASK.T, ((0, 0), (0, 8))), 15, wide).astype(np.uint8)

    def packed(values: np.ndarray) -> np.ndarray:
        return values if bits == 8 else (values[:, ::2] | values[:, 1::2] << 4).astype(np.uint8)

    constants = {"w": packed(stored).reshape(10, 2, -1), "s": np.ones(20, np.float32)}
    names = ["x", "w", "s"]
    if points:
        constants["z"] = packed(zero.astype(np.uint8)).ravel()
        names.append("z")
    product = node("MatMulNBits", *names, domain="com.microsoft", K=24, N=10, bits=bits,
                   block_size=16)  # fmt: skip
    found = only(graph([product], constants, "com.microsoft"))
    assert found.shape == (24, 10)
    assert (found.nonzero() == MASK).all()


def test_what_is_no_constant_matrix_is_left_out() -> None:
    nodes = [
        node("MatMul", "x", "x", out="a"),
        node("Add", "w", "w", out="b"),
        node("MatMul", "x", "b", out="c"),
        node("MatMul", "x", "stack", out="y"),
    ]
    model = graph(nodes, {"w": VALUES, "stack": np.ones((2, 24, 10), np.float32)})
    assert not list(matrices(model, Path()))


def saved(folder: Path) -> Path:
    model = graph([node("MatMul", "x", "w")], {"w": VALUES})
    path = folder / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="data", size_threshold=0)
    return path


def test_external_data_are_mapped_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path)
    found = only(load(path), tmp_path)
    assert isinstance(found.stored(), np.memmap)
    assert (found.nonzero() == MASK).all()


def test_external_data_that_are_missing_or_elsewhere_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tensor,) = load(path).graph.initializer
    (tmp_path / "data").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is too short for w"):
        array_of(tensor, tmp_path)
    next(entry for entry in tensor.external_data if entry.key == "location").value = "../data"
    with pytest.raises(CheckpointError, match="outside of the graph's directory"):
        array_of(tensor, tmp_path)
    path.write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match="is not an ONNX graph"):
        load(path)


@given(
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, np.int8])
)
def test_both_zeros_are_zero_in_every_type(dtype: Any) -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, 0.5 if dtype != np.int8 else 3], dtype)
    assert nonzero(values).tolist() == [False, False, True, True, True]


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 6), st.floats(0, 1))
def test_the_pattern_equals_a_slow_count(
    seed: int, inputs: int, outputs: int, share: float
) -> None:
    used = np.random.default_rng(seed).random((inputs, outputs)) < share

    def most(of: int) -> int:
        return max(
            int(used[start : start + of, output].sum())
            for output in range(outputs) for start in range(0, inputs, of)
        )  # fmt: skip

    slow = next(
        (Nm(max(most(of), 1), of) for of in (4, 8, 16, 6, 10, 12, 14) if most(of) < of), None
    )
    assert pattern_held(used) == slow


def test_patterns_of_a_graph(tmp_path: Path) -> None:
    weights = {
        "two_four": np.tile([[1], [0], [0], [1]], (6, 10)), "dense": np.ones((24, 10)),
        "six_eight": np.tile([[1]] * 6 + [[0]] * 2, (3, 10)), "loose": VALUES,
    }  # fmt: skip
    nodes = [node("MatMul", "x", name, out=f"by_{name}") for name in weights]
    nodes += [node("MatMul", "x", "two_four", out="again"), node("Identity", "again")]
    model = graph(nodes, {name: value.astype(np.float32) for name, value in weights.items()})
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = patterns(tmp_path / "model.onnx")
    assert [one.name for one in found] == list(weights), "a weight that is read twice is told once"
    assert found[0] == Achieved("two_four", 24, 10, 0.5, "2 of 4")
    assert found[1] == Achieved("dense", 24, 10, 0.0, "")
    assert found[2] == Achieved("six_eight", 24, 10, 0.25, "6 of 8")
    assert found[3].zeros == pytest.approx(1 - MASK.mean())
