"""Quantizes the linear layers of a graph's blocks to int8 or fp8, by explicit Q/DQ nodes.

1. A weight is stored in 8 bits with a scale for each output, and dequantized where it is read. Zero
   is exact in both types, so a pattern of zeros stays what it was.
2. An activation is quantized and dequantized with one scale, once for all products that read it:
   its largest magnitude over the calibration text, so that nothing seen there is clipped.
3. Head and embedding stay as they are, and so does attention: their error is felt the most. In int8
   so does a product whose input has outliers: one step of its scale would be as large as what most
   of its numbers say. SmolLM2-135M, computed by ONNX Runtime after 4 texts of 64 tokens, KL from
   fp16: int8 1.23 nats with all 120 products, 0.13 with the 87 that are left (at 24 instead of 30
   times the root mean square: 0.03 with 74); fp8, whose steps are relative, 0.10 with all.

With both inputs in 8 bits TensorRT multiplies in 8 bits, sparse kernels among them. Sources:
TensorRT, "Working with Quantized Types" (placement); Micikevicius et al., "FP8 Formats for Deep
Learning", arXiv:2209.05433 (E4M3 and its largest value).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import onnx

from prune_export.errors import StageError
from prune_export.sparsity.onnx_weights import Matrix, array_of, load, matrices

Kind = Literal["int8", "fp8"]

_TYPES: Final[Mapping[Kind, tuple[int, Any, float]]] = {
    "int8": (onnx.TensorProto.INT8, np.int8, 127.0),
    "fp8": (onnx.TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 448.0),
}
"""For each kind: the ONNX type, numpy's, and the largest value."""

_IN_BLOCK: Final = re.compile(r"\blayers\.|\.h\.|\.blocks\.")
_ALIGNMENT: Final = 4096
_LARGEST: Final = "largest/"
_SQUARE: Final = "square/"
OUTLIERS: Final[Mapping[Kind, float]] = {"int8": 30.0, "fp8": float("inf")}
"""How many times its root mean square an activation may reach and still be quantized."""


@dataclass(frozen=True)
class Range:
    """The range of an activation on the calibration text: largest magnitude, root mean square."""

    top: float
    rms: float

    def fits(self, kind: Kind) -> bool:
        """Whether one scale suits the activation: its outliers are not too large."""
        return self.top <= OUTLIERS[kind] * self.rms


@dataclass(frozen=True)
class Quantized:
    """The result: quantized products, distinct activations, and bytes saved.

    `left` products were not, because of outliers in their input.
    """

    products: int
    activations: int
    left: int
    saved_bytes: int


def observed(graph: Path, out: Path) -> tuple[str, ...]:
    """Adds range outputs for each activation to a graph; writes it to `out`, in its directory.

    That is further outputs, `largest/<activation>` and `square/<activation>`, its mean square;
    returns the activations.
    """
    model = load(graph)
    names = tuple(dict.fromkeys(matrix.node.input[0] for matrix in _linears(model, graph.parent)))
    for name in names:
        wide, size = f"{name}/float", f"{name}/magnitude"
        model.graph.node.extend(
            [
                onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Abs", [wide], [size]),
                onnx.helper.make_node("ReduceMax", [size], [f"{_LARGEST}{name}"], keepdims=0),
                onnx.helper.make_node("Mul", [wide, wide], [f"{name}/power"]),
                onnx.helper.make_node(
                    "ReduceMean", [f"{name}/power"], [f"{_SQUARE}{name}"], keepdims=0
                ),
            ]
        )
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(f"{what}{name}", onnx.TensorProto.FLOAT, [])
            for what in (_LARGEST, _SQUARE)
        )
    out.write_bytes(model.SerializeToString(deterministic=True))
    return names


def ranges(graph: Path, ids: np.ndarray, threads: int) -> dict[str, Range]:
    """Measures the range of each activation over `ids` int64 `[windows, length]`.

    `graph` is what `observed` wrote.

    Raises:
        StageError: the graph does not load, or an activation is not finite.
    """
    session = _session(graph, threads)
    names = [
        one.name.removeprefix(_LARGEST)
        for one in session.get_outputs()
        if one.name.startswith(_LARGEST)
    ]
    wanted = [f"{what}{name}" for what in (_LARGEST, _SQUARE) for name in names]
    rows = np.array([session.run(wanted, dict(_fed(session, window))) for window in ids])
    tops, squares = rows[:, : len(names)].max(axis=0), rows[:, len(names) :].mean(axis=0)
    if not np.isfinite(tops).all():
        raise StageError(
            f"{graph}  {names[int(np.argmin(np.isfinite(tops)))]}",
            "overflows on the calibration text",
            "write `precision: bf16`, which has float32's range",
        )
    return {
        name: Range(float(top), float(np.sqrt(square)))
        for name, top, square in zip(names, tops, squares, strict=True)
    }


def last_logits(graph: Path, ids: np.ndarray, threads: int) -> np.ndarray:
    """Computes the last logits of each window of `ids`, float64 `[windows, vocabulary]`."""
    session = _session(graph, threads)
    rows = [session.run(["logits"], dict(_fed(session, window)))[0][0, -1] for window in ids]
    return np.stack(rows).astype(np.float64)


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Computes the mean KL(teacher ‖ student) in nats, from logits `[windows, vocabulary]`."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (teacher, student))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def quantize(graph: Path, kind: Kind, reached: Mapping[str, Range]) -> Quantized:
    """Quantizes the graph and its data in place; `reached` has every activation's range."""
    model = load(graph)
    every = list(_linears(model, graph.parent))
    found = [matrix for matrix in every if reached[matrix.node.input[0]].fits(kind)]
    weights = {matrix.name: matrix for matrix in found}
    products = {matrix.node.output[0] for matrix in found}
    nodes: list[Any] = []
    done: set[str] = set()
    for node in model.graph.node:
        if node.output and node.output[0] in products:
            activation, weight = node.input[0], node.input[1]
            for name in (activation, weight):
                if name not in done:
                    done.add(name)
                    nodes += _weight_nodes(name) if name in weights else _activation_nodes(name)
            node.input[0], node.input[1] = f"{activation}/dequantized", f"{weight}/dequantized"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    activations = sorted(done - weights.keys())
    scalar = _float_of(next(iter(weights.values()))) if weights else np.dtype(np.float32)
    least = float(ml_dtypes.finfo(scalar).smallest_subnormal)  # a scale of 0 is refused
    for name in activations:
        scale = np.array(max(reached[name].top / _TYPES[kind][2], least)).astype(scalar)
        _add(model.graph, f"{name}/scale", scale)
        _add(model.graph, f"{name}/zero", np.zeros((), _TYPES[kind][1]))
    saved = _write(model.graph, graph, weights, kind)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    return Quantized(len(products), len(activations), len(every) - len(found), saved)


def _linears(model: Any, folder: Path) -> Iterator[Matrix]:
    """Finds the products with weights inside blocks, stored `[in, out]`."""
    for matrix in matrices(model, folder):
        plain = matrix.node.op_type == "MatMul" and not matrix.turned and not matrix.through
        if plain and _IN_BLOCK.search(matrix.name):
            yield matrix


def _session(graph: Path, threads: int) -> Any:
    """Opens the graph on the CPU, unfused: the runtime's own 8-bit products round elsewhere."""
    from prune_export.exporters._shared.ort_runner import session_for
    from prune_export.machine import Machine

    return session_for(graph, Machine("cpu", 0, 0, threads), fuse=False)


def _fed(session: Any, window: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The graph's inputs for a window of ids, with an empty cache."""
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    length = len(window)
    plain = {
        "input_ids": window[None],
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
    }
    for one in session.get_inputs():
        if one.name in plain:
            yield one.name, plain[one.name]
        else:
            yield one.name, np.zeros((1, one.shape[1], 0, one.shape[3]), kinds[one.type])


def _activation_nodes(name: str) -> list[Any]:
    scale, zero, small = f"{name}/scale", f"{name}/zero", f"{name}/quantized"
    return [
        onnx.helper.make_node(
            "QuantizeLinear", [name, scale, zero], [small], name=f"{name}/Quantize"
        ),
        _dequantize(name, small, scale, zero),
    ]


def _weight_nodes(name: str) -> list[Any]:
    return [_dequantize(name, name, f"{name}/scale", f"{name}/zero", axis=1)]


def _dequantize(name: str, small: str, scale: str, zero: str, **given: Any) -> Any:
    wrote = [f"{name}/dequantized"]
    return onnx.helper.make_node(
        "DequantizeLinear", [small, scale, zero], wrote, name=f"{name}/Dequantize", **given
    )


def _float_of(matrix: Matrix) -> Any:
    return matrix.stored().dtype


def _small(values: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Rounds `[in, out]` to 8 bits, with scales `[out]` in the type of the values."""
    _, small, top = _TYPES[kind]
    wide = values.astype(np.float32)
    scale = np.maximum(np.abs(wide).max(axis=0), 1e-6) / top
    scale = scale.astype(values.dtype).astype(np.float32)  # as it is stored
    scale = np.maximum(scale, float(ml_dtypes.finfo(values.dtype).smallest_subnormal))
    steps = np.clip(wide / scale, -top, top)
    if kind == "int8":
        steps = np.rint(steps)
    return steps.astype(small), scale.astype(values.dtype)


def _write(graph: Any, file: Path, weights: Mapping[str, Matrix], kind: Kind) -> int:
    """Writes all external data anew, the weights in 8 bits; returns the bytes saved."""
    folder = file.parent
    data = folder / f"{file.name}_data"
    partial = data.with_name(f"{data.name}.partial")
    saved = 0
    more: list[tuple[str, np.ndarray]] = []
    with partial.open("wb") as stream:
        for tensor in graph.initializer:
            if tensor.name in weights:
                values = weights[tensor.name].stored()
                small, scale = _small(np.asarray(values), kind)
                more += [
                    (f"{tensor.name}/scale", scale),
                    (f"{tensor.name}/zero", np.zeros(scale.shape, small.dtype)),
                ]
                saved += values.nbytes - small.nbytes - scale.nbytes
                tensor.data_type = _TYPES[kind][0]
                _place(tensor, small, data.name, stream)
            elif tensor.data_location == onnx.TensorProto.EXTERNAL:
                _place(tensor, array_of(tensor, folder), data.name, stream)
    for name, value in more:
        _add(graph, name, value)
    partial.replace(data)
    return saved


def _place(tensor: Any, values: np.ndarray, location: str, stream: Any) -> None:
    stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
    place = {"location": location, "offset": stream.tell(), "length": values.nbytes}
    stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.dims[:], tensor.external_data[:]
    tensor.dims.extend(values.shape)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def _add(graph: Any, name: str, value: np.ndarray) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(value, name))
