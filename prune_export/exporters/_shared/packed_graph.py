"""Rewrites the products of an ONNX graph so that they read packed weights (ADR 0042).

A product with constant int8 or int4 codes (`MatMulNBits`, or `DequantizeLinear` and `MatMul`), or
with float32 weights that are bf16 numbers, becomes `prune_export::PackedMatMul` of the same
weights. Its operator is in a library that is put beside the graph. What the kernel has no format
for stays as it is: zero points other than the middle, biases in the product, stacked experts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
import onnx

from prune_export.errors import StageError
from prune_export.kernels import LIBRARY, Packed, compile_library, pack_codes, pack_floats
from prune_export.kernels.packing import OPERATOR, Layout, takes_group
from prune_export.sparsity.onnx_weights import Matrix, array_of, load, matrices, raw_of

DOMAIN: Final = "prune_export"
ALIGNMENT: Final = 4096
"""Tensors start on a page, so that a runtime can map them instead of reading them."""

Zeros = Literal["sparse", "dense"]
"""Whether what is zero is left out, where that takes fewer bytes, or stored like the rest."""


@dataclass(frozen=True)
class PackedGraph:
    """What was packed: layouts by matrix, bytes before and after, and what stays and why."""

    layouts: Mapping[str, str]
    before_bytes: int
    after_bytes: int
    nodes: int
    left: tuple[str, ...]
    compiler: str

    @property
    def sparse(self) -> tuple[str, ...]:
        """The matrices whose zeros are not stored."""
        return tuple(name for name, layout in self.layouts.items() if not layout.endswith("dense"))

    def note(self) -> str:
        """A sentence for the build record."""
        counts = Counter(self.layouts.values())
        kinds = ", ".join(f"{count} {layout}" for layout, count in counts.most_common())
        stays = f"; {len(self.left)} products stay ({self.left[0]})" if self.left else ""
        return (
            f"packed weights: {kinds}; {self.after_bytes / max(self.before_bytes, 1):.2f} of the "
            f"bytes of these matrices{stays}; kernel compiled by {self.compiler}"
        )


def pack_graph(graph: Path, zeros: Zeros) -> PackedGraph:
    """Packs the weights of the ONNX graph at `graph`, in place, and puts the library beside it.

    The data go into a new file that takes the old one's place at the end.

    Raises:
        StageError: there is nothing that can be packed, or the kernel does not compile.
    """
    model = load(graph)
    packed: dict[str, Packed] = {}
    nodes: dict[str, str] = {}
    before, left = 0, []
    for matrix in matrices(model, graph.parent):
        name = f"{matrix.name}_packed"
        if name not in packed:
            found = _packed(matrix, zeros)
            if isinstance(found, str):
                left.append(f"{matrix.node.name or matrix.name}: {found}")
                continue
            packed[name] = found
            before += _stored_bytes(matrix)
        nodes[matrix.node.output[0]] = name
    if not packed:
        reason = left[0] if left else "no product has a constant matrix"
        raise StageError(
            f"{graph}  packed",
            f"no weight can be packed: {reason}",
            "write `precision: int8`, or leave `packed` out",
        )
    _reconnect(model, nodes)
    compiler = compile_library(graph.with_name(LIBRARY))
    after = _write(model.graph, packed, graph)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    layouts = {name: f"{one.values} {one.layout}" for name, one in packed.items()}
    return PackedGraph(layouts, before, after, len(nodes), tuple(left), compiler)


def _packed(matrix: Matrix, zeros: Zeros) -> Packed | str:
    """Packs a matrix; gives in words why it cannot be."""
    layout: Layout | None = "dense" if zeros == "dense" else None
    if matrix.node.op_type == "MatMulNBits":
        return _packed_blocks(matrix, layout)
    given = _attributes(matrix.node)
    if matrix.node.op_type != "MatMul" or any(given.get(key) for key in ("transA", "transB")):
        return f"a {matrix.node.op_type}, not a plain product"
    kinds = [node.op_type for node in matrix.through]
    if "DequantizeLinear" in kinds:
        return _packed_dequantized(matrix, kinds, layout)
    if kinds not in ([], ["Transpose"]):
        return f"its weight comes through {', '.join(kinds)}"
    stored = matrix.stored()
    if stored.dtype != np.float32:
        return f"its weights are {stored.dtype}"
    bits = np.ascontiguousarray(stored if matrix.turned else stored.T).view(np.uint32)
    if (bits & 0xFFFF).any():
        return "its weights are no bf16 numbers"
    return pack_floats((bits >> 16).astype(np.uint16), layout)


def _packed_blocks(matrix: Matrix, layout: Layout | None) -> Packed | str:
    """Packs the codes of a `MatMulNBits`: uint8 `[out, blocks, bytes]`."""
    given, more = _attributes(matrix.node), list(matrix.node.input[3:])
    bits, block = int(given["bits"]), int(given["block_size"])
    inputs, outputs = matrix.shape
    if bits not in (4, 8) or not takes_group(block):
        return f"{bits} bits in blocks of {block}"
    if any(more[1:]):
        return "it has a bias or an order of its own"
    codes = matrix.codes()
    if any(more[:1]) and not matrix.is_symmetric():
        return "it has zero points"
    scales = array_of(matrix.constants[matrix.node.input[2]], matrix.folder)
    middle = 1 << bits - 1
    signed = codes[:, :inputs].astype(np.int16) - middle
    each = scales.astype(np.float32).reshape(outputs, -1)
    return pack_codes(signed, each, block, "int8" if bits == 8 else "int4", layout)


def _packed_dequantized(matrix: Matrix, kinds: list[str], layout: Layout | None) -> Packed | str:
    """Packs codes `[in, out]` that a `DequantizeLinear` scales in blocks of inputs."""
    node = matrix.through[-1]
    given = _attributes(node)
    types = {onnx.TensorProto.INT8: "int8", onnx.TensorProto.INT4: "int4"}
    values = types.get(matrix.tensor.data_type)
    if kinds != ["DequantizeLinear"] or values is None or (len(node.input) > 2 and node.input[2]):
        return "it has zero points, or is turned"
    block, axis = int(given.get("block_size", 0)), int(given.get("axis", 1))
    if axis != 0 or not takes_group(block):
        return f"its scales are for blocks of {block}"
    scales = array_of(matrix.constants[node.input[1]], matrix.folder)
    rows, columns = matrix.tensor.dims
    if values == "int8":
        codes = matrix.stored()
    else:
        raw = raw_of(matrix.tensor, matrix.folder)
        nibbles = np.stack([raw & 15, raw >> 4], axis=1).reshape(-1)[: rows * columns]
        codes = ((nibbles ^ 8).astype(np.int8) - 8).reshape(rows, columns)
    each = np.ascontiguousarray(scales.T.astype(np.float32))
    return pack_codes(np.ascontiguousarray(codes.T), each, block, values, layout)  # type: ignore[arg-type]


def _stored_bytes(matrix: Matrix) -> int:
    """The bytes of a matrix as it was, with its scales."""
    reader = next((one for one in matrix.through if one.op_type == "DequantizeLinear"), matrix.node)
    names = [matrix.name, *(reader.input[2:3] if reader is matrix.node else reader.input[1:2])]
    return sum(raw_of(matrix.constants[n], matrix.folder).nbytes for n in names if n)


def _reconnect(model: Any, nodes: Mapping[str, str]) -> None:
    """Puts the operator in the place of products, and takes out what nobody reads any more."""
    graph = model.graph
    kept = []
    for node in graph.node:
        name = nodes.get(node.output[0], "") if node.output else ""
        if name:
            made = onnx.helper.make_node(
                OPERATOR, [node.input[0], name], [node.output[0]], name=node.name, domain=DOMAIN
            )
            kept.append(made)
        else:
            kept.append(node)
    read = {name for node in kept for name in node.input} | {out.name for out in graph.output}
    for node in reversed(kept[:]):
        if node.op_type in ("DequantizeLinear", "Transpose") and not read & set(node.output):
            kept.remove(node)
            read = {name for one in kept for name in one.input} | {o.name for o in graph.output}
    del graph.node[:]
    graph.node.extend(kept)
    held = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(held)
    if all(entry.domain != DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _write(graph: Any, packed: Mapping[str, Packed], path: Path) -> int:
    """Writes all external data anew, and the packed matrices with them; counts their bytes."""
    folder, name = path.parent, f"{path.name}_data"
    name = next(_locations(graph), name)
    partial = folder / f"{name}.partial"
    with partial.open("wb") as stream:
        for tensor in graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _place(tensor, raw_of(tensor, folder), name, stream)
        for key, one in packed.items():
            tensor = graph.initializer.add()
            tensor.name, tensor.data_type = key, onnx.TensorProto.UINT8
            tensor.dims.append(one.data.size)
            _place(tensor, one.data, name, stream)
    os.replace(partial, folder / name)
    return sum(one.data.size for one in packed.values())


def _locations(graph: Any) -> Iterator[str]:
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                yield entry.value


def _place(tensor: Any, data: np.ndarray, file: str, stream: BinaryIO) -> None:
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    start = stream.tell()
    stream.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", start), ("length", data.nbytes)):
        tensor.external_data.add(key=key, value=str(value))


def _attributes(node: Any) -> dict[str, Any]:
    return {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
