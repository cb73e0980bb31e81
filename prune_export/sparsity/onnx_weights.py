"""Finds the weight matrices of an ONNX graph, and which of their weights are zero.

A weight is followed backwards from its product through what keeps its zeros: Cast, Identity,
Transpose, QuantizeLinear, DequantizeLinear. External data are mapped, not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from prune_export.errors import CheckpointError
from prune_export.kernels.packing import OPERATOR as _PACKED
from prune_export.kernels.packing import read, unpack
from prune_export.system.cached import is_within
from prune_export.system.files import read_regular

_LONGEST_GRAPH: Final = 2**31
"""Protobuf's own bound."""
_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "MatMulNBits", _PACKED})
_KEEP_ZEROS: Final = frozenset(
    {"Cast", "Identity", "Transpose", "QuantizeLinear", "DequantizeLinear"}
)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix: a constant that a node multiplies its input with.

    `name` is the initializer's, `tensor` its proto, `node` the product; `turned` says that it is
    stored `[out, in]`; `through` are the nodes between it and its product, nearest first.
    """

    name: str
    tensor: Any
    node: Any
    turned: bool
    through: tuple[Any, ...]
    folder: Path
    constants: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Inputs and outputs."""
        if self.node.op_type == "MatMulNBits":
            given = _attributes(self.node)
            return int(given["K"]), int(given["N"])
        if self.node.op_type == _PACKED:
            head = read(self.stored())
            return head.columns, head.rows
        rows, columns = (int(size) for size in self.tensor.dims)
        return (columns, rows) if self.turned else (rows, columns)

    def stored(self) -> np.ndarray:
        """Reads the values as they are stored, `[in, out]` or, if `turned`, `[out, in]`."""
        return array_of(self.tensor, self.folder)

    def nonzero(self) -> np.ndarray:
        """Computes the mask of non-zero weights, bool `[in, out]`."""
        if self.node.op_type == "MatMulNBits":
            return self._nonzero_blocks()
        if self.node.op_type == _PACKED:
            held: np.ndarray = (unpack(self.stored()) != 0).T
            return held
        values = self.stored()
        zeros = self._zero_points()
        used = nonzero(values) if zeros is None else values != zeros
        return used.T if self.turned else used

    def _zero_points(self) -> np.ndarray | None:
        """What is stored where the weight is zero; None where that is 0."""
        nearest = [node for node in self.through if node.op_type == "DequantizeLinear"]
        node = next((one for one in nearest if one.input[0] == self.name), None)
        if node is None or len(node.input) < 3 or not node.input[2]:
            return None
        points = array_of(self.constants[node.input[2]], self.folder)
        if not points.any():
            return None
        given = _attributes(node)
        axis, block = int(given.get("axis", 1)), int(given.get("block_size", 0))
        if block:
            return np.repeat(points, block, axis=axis)[: self.tensor.dims[0], : self.tensor.dims[1]]
        return np.expand_dims(points, 1 - axis % 2) if points.ndim == 1 else points

    def _nonzero_blocks(self) -> np.ndarray:
        """Of ONNX Runtime's own product: codes that are not their block's zero point."""
        used: np.ndarray = (self.codes() != self._points())[:, : self.shape[0]]
        return used.T

    def codes(self) -> np.ndarray:
        """The codes uint8 `[out, in]` of a `MatMulNBits`, the last block filled up.

        They are stored `[out, blocks, bytes]`, low bits first.
        """
        bits = int(_attributes(self.node)["bits"])
        return _unpacked(self.stored().reshape(self.shape[1], -1), bits)

    def is_symmetric(self) -> bool:
        """Whether all zero points of a `MatMulNBits` are the middle of its codes."""
        bits = int(_attributes(self.node)["bits"])
        return bool((self._points() == 1 << (bits - 1)).all())

    def _points(self) -> np.ndarray:
        """The zero point of each code of a `MatMulNBits`, or of all."""
        given = _attributes(self.node)
        bits, block = int(given["bits"]), int(given["block_size"])
        if len(self.node.input) > 3 and self.node.input[3]:
            packed = array_of(self.constants[self.node.input[3]], self.folder)
            points = _unpacked(packed.reshape(self.shape[1], -1), bits)
            return points[:, : -(-self.shape[0] // block)].repeat(block, axis=1)
        return np.array(1 << (bits - 1), np.uint8)


def matrices(model: Any, folder: Path) -> Iterator[Matrix]:
    """Lists every product of an ONNX model with a constant matrix, in graph order."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS or len(node.input) < 2:
            continue
        name, through = node.input[1], []
        turned = node.op_type == "Gemm" and bool(_attributes(node).get("transB", 0))
        while name not in constants and (maker := makers.get(name)) is not None:
            if maker.op_type not in _KEEP_ZEROS:
                break
            turned ^= maker.op_type == "Transpose"
            through.append(maker)
            name = maker.input[0]
        tensor = constants.get(name)
        whole = node.op_type in ("MatMulNBits", _PACKED)
        if tensor is not None and (whole or len(tensor.dims) == 2):
            yield Matrix(name, tensor, node, turned, tuple(through), folder, constants)


def load(graph: Path) -> Any:
    """Loads an ONNX model without its external data.

    Raises:
        CheckpointError: it is not one.
    """
    import onnx

    text = read_regular(graph, _LONGEST_GRAPH, "an ONNX graph")
    try:
        return onnx.load_model_from_string(text)
    except Exception as error:  # protobuf's own class has no public stubs
        raise CheckpointError(
            str(graph), f"is not an ONNX graph: {error}", "export again"
        ) from None


def array_of(tensor: Any, folder: Path) -> np.ndarray:
    """Reads an ONNX tensor; external data are memory-mapped from their file in `folder`.

    Raises:
        CheckpointError: the data lie outside of `folder`, or the file is too short.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        inline: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return inline
    place = {entry.key: entry.value for entry in tensor.external_data}
    try:
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file, offset = folder / place["location"], int(place.get("offset", 0))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            str(folder), f"says of {tensor.name} no type or place: {error}", "export again"
        ) from None
    length = prod(tensor.dims) * kind.itemsize
    if offset < 0 or min(tensor.dims, default=0) < 0:
        raise CheckpointError(str(file), f"has a negative place for {tensor.name}", "export again")
    if not is_within(file, folder):
        raise CheckpointError(
            str(file),
            f"is outside of the graph's directory, but {tensor.name} names it",
            "do not use this engine: a sound one names files beside its graph",
        )
    if not file.is_file() or file.stat().st_size < offset + length:
        raise CheckpointError(str(file), f"is too short for {tensor.name}", "export again")
    mapped: np.ndarray = np.memmap(file, kind, "r", offset, tuple(tensor.dims))
    return mapped


def raw_of(tensor: Any, folder: Path) -> np.ndarray:
    """The bytes of an ONNX tensor as they are stored, uint8; mapped where they are external.

    Raises:
        CheckpointError: as `array_of`.
    """
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        if tensor.raw_data:
            return np.frombuffer(tensor.raw_data, np.uint8)
        inline: np.ndarray = onnx.numpy_helper.to_array(tensor).reshape(-1).view(np.uint8)
        return inline
    length = next((int(one.value) for one in tensor.external_data if one.key == "length"), None)
    as_bytes = onnx.TensorProto(name=tensor.name, data_type=onnx.TensorProto.UINT8)
    as_bytes.data_location = onnx.TensorProto.EXTERNAL
    as_bytes.external_data.extend(tensor.external_data)
    if length is None:
        return array_of(tensor, folder).reshape(-1).view(np.uint8)
    as_bytes.dims.append(length)
    return array_of(as_bytes, folder)


def nonzero(values: np.ndarray) -> np.ndarray:
    """Marks values that are not zero; by their bits for types that numpy does not know."""
    if values.dtype.kind in "biuf":
        used: np.ndarray = values != 0
        return used
    if values.dtype.itemsize > 2:
        used = values.astype(np.float32) != 0
        return used
    bits = values.view(np.uint8 if values.dtype.itemsize == 1 else np.uint16)
    magnitude = bits & np.array((1 << (8 * values.dtype.itemsize - 1)) - 1, bits.dtype)
    used = magnitude != 0
    return used


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 values of `bits` bits each, from bytes `[rows, bytes]`, low bits first."""
    packed = packed.view(np.uint8)
    if bits == 8:
        return packed
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(len(packed), -1)


def _attributes(node: Any) -> dict[str, Any]:
    import onnx

    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
