"""SlideSparse: rewrites (2N-2):2N weights of a graph as 2:4, for sparse tensor cores.

1. A weight that holds 2 of 4 stays as it is, and so does one without a pattern.
2. One that holds 2N-2 of every 2N is expanded along its inputs (`sparsity.slidesparse`).
3. Its product reads the activation through a Gather, one for each distinct activation and pattern.
4. Outputs that sparse kernels cannot take are padded with zeros, and sliced off again.

The result is a plain graph that computes the same in every runtime.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import onnx

from prune_export.sparsity import slidesparse
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import Matrix, array_of, load, matrices, nonzero

ALIGNMENT: Final = 4096
"""Tensors start on a page, so that a runtime can map them instead of reading them."""

_HARDWARE: Final = Nm(2, 4)


@dataclass(frozen=True)
class Slid:
    """What was rewritten: the pattern of each weight, number of Gathers, bytes added.

    `ready` are the weights that held 2 of 4 before; `half` those that held 4 of 8 and were
    rewritten as 6 of 8.
    """

    rewritten: Mapping[str, Nm]
    ready: tuple[str, ...]
    half: tuple[str, ...]
    gathers: int
    added_bytes: int

    def notes(self) -> tuple[str, ...]:
        """Notes for the build record."""
        if not self.rewritten:
            why = (
                f"{len(self.ready)} weights hold 2 of 4 already"
                if self.ready
                else "no weight holds a pattern that it can rewrite"
            )
            return (f"sliding windows: nothing to do, {why}",)
        counts = Counter(self.rewritten.values())
        notes = [
            f"sliding windows: {count} weights hold {pattern} and became 2 of 4, at most "
            f"{slidesparse.bound(pattern):.2f}x of dense in their products"
            for pattern, count in sorted(counts.items(), key=lambda item: item[0].of)
        ]
        notes[-1] += f"; {self.gathers} gathers, {len(self.ready)} held 2 of 4 already"
        if self.half:
            notes.append(
                f"{len(self.half)} weights hold 4 of 8, which needs the windows of 6 of 8 and is "
                "no faster: prune with `nm: {keep: 6, of: 8}` for the same speed and better quality"
            )
        return tuple(notes)


@dataclass(frozen=True)
class _Plan:
    """The rewriting of one weight; `inputs` and `outputs` are its sizes before."""

    pattern: Nm
    inputs: int
    outputs: int


def slide(graph: Path) -> Slid:
    """Rewrites the ONNX graph at `graph` and its external data, in place.

    The data go into a new file that takes the old one's place at the end.
    """
    model = load(graph)
    found = list(_products(model, graph.parent))
    plans: dict[str, _Plan] = {}
    ready: list[str] = []
    half: list[str] = []
    for matrix in {matrix.name: matrix for matrix in found}.values():
        used = matrix.nonzero()
        if slidesparse.holds(used, _HARDWARE):
            ready.append(matrix.name)
        elif pattern := slidesparse.pattern_of(used):
            plans[matrix.name] = _Plan(pattern, *matrix.shape)
            if pattern.of == 8 and slidesparse.holds(used, Nm(4, 8)):
                half.append(matrix.name)
    if not plans:
        return Slid({}, tuple(ready), (), 0, 0)
    rewritten = [matrix for matrix in found if matrix.name in plans]
    gathers = _reconnect(model.graph, rewritten, plans)
    added = _write(model.graph, rewritten, plans, graph.parent)
    graph.write_bytes(model.SerializeToString(deterministic=True))
    patterns = {name: plan.pattern for name, plan in plans.items()}
    return Slid(patterns, tuple(ready), tuple(half), gathers, added)


def _products(model: Any, folder: Path) -> Iterator[Matrix]:
    """Finds matrices that are read by products of one kind only."""
    found = list(matrices(model, folder))
    readers = Counter(name for node in model.graph.node for name in node.input)
    counts = Counter(matrix.name for matrix in found)
    kinds = Counter(name for name, *_ in {(m.name, m.turned, m.node.op_type) for m in found})
    for matrix in found:
        given = {entry.name: entry.i for entry in matrix.node.attribute}
        plain = matrix.node.op_type in ("MatMul", "Gemm") and not given.get("transA")
        alone = readers[matrix.name] == counts[matrix.name] and kinds[matrix.name] == 1
        if plain and alone and not matrix.through:
            yield matrix


def _reconnect(graph: Any, found: list[Matrix], plans: Mapping[str, _Plan]) -> int:
    """Inserts a Gather before each product, shared by products of one activation; counts them."""
    products = {matrix.node.output[0]: matrix.name for matrix in found}
    constants: dict[str, np.ndarray] = {}
    gathered: dict[tuple[str, int], str] = {}
    nodes: list[Any] = []
    for node in graph.node:
        name = products.get(node.output[0], "") if node.output else ""
        if not name:
            nodes.append(node)
            continue
        plan, key = plans[name], (node.input[0], plans[name].pattern.of)
        if key not in gathered:
            index = f"windows_{plan.pattern.of}_of_{plan.inputs}"
            constants[index] = slidesparse.gather_index(plan.inputs, plan.pattern)
            gathered[key] = f"{node.input[0]}.windows_{plan.pattern.of}"
            read, wrote = [node.input[0], index], [gathered[key]]
            nodes.append(_node("Gather", read, wrote, node.name, axis=-1))
        node.input[0] = gathered[key]
        nodes.append(node)
        if _padding(plan, node.op_type):
            wide = f"{node.output[0]}.padded"
            ends = f"outputs_{plan.outputs}"
            constants |= {"outputs_start": np.array([0]), "outputs_axis": np.array([-1]),
                          ends: np.array([plan.outputs])}  # fmt: skip
            read = [wide, "outputs_start", ends, "outputs_axis"]
            nodes.append(_node("Slice", read, [node.output[0]], node.name))
            node.output[0] = wide
    del graph.node[:]
    graph.node.extend(nodes)
    for name, value in constants.items():
        graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.int64), name))
    return len(gathered)


def _node(kind: str, read: list[str], wrote: list[str], where: str, **given: Any) -> Any:
    return onnx.helper.make_node(kind, read, wrote, name=f"{where}/{kind}", **given)


def _padding(plan: _Plan, kind: str) -> int:
    """The number of zero outputs to add; none to a Gemm, as its bias has a fixed size."""
    return -plan.outputs % slidesparse.OUTPUTS_MULTIPLE if kind == "MatMul" else 0


def _write(graph: Any, found: list[Matrix], plans: Mapping[str, _Plan], folder: Path) -> int:
    """Writes the expanded weights, and all external data anew; returns the bytes added."""
    by_name = {matrix.name: matrix for matrix in found}
    streams: dict[str, BinaryIO] = {}
    added = 0
    with ExitStack() as stack:
        for tensor in graph.initializer:
            values = array_of(tensor, folder) if _is_external(tensor) else None
            if matrix := by_name.get(tensor.name):
                values = _expanded(matrix, plans[tensor.name])
                added += values.nbytes - matrix.stored().nbytes
            if values is None:
                continue
            if not _is_external(tensor):
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
                continue
            file = next(entry.value for entry in tensor.external_data if entry.key == "location")
            if file not in streams:
                streams[file] = stack.enter_context((folder / f"{file}.partial").open("wb"))
            _append(tensor, values, file, streams[file])
    for file in streams:
        os.replace(folder / f"{file}.partial", folder / file)
    return added


def _append(tensor: Any, values: np.ndarray, file: str, stream: BinaryIO) -> None:
    stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
    place = {"location": file, "offset": stream.tell(), "length": values.nbytes}
    stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    del tensor.dims[:], tensor.external_data[:]
    tensor.dims.extend(values.shape)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))


def _is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _expanded(matrix: Matrix, plan: _Plan) -> np.ndarray:
    """Expands a weight's inputs and pads its outputs, in the layout that it is stored in."""
    stored = matrix.stored()
    weight = stored.T if matrix.turned else stored
    wide = slidesparse.expanded(weight, plan.pattern, nonzero(weight))
    if short := _padding(plan, matrix.node.op_type):
        wide = np.pad(wide, ((0, 0), (0, short)))
    return np.ascontiguousarray(wide.T) if matrix.turned else wide
