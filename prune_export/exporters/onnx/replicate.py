"""Builds the whole graph from the traced one: repeats its blocks, one a layer.

1. The graph is cut: `cut`.
2. A weight that is only ever transposed is stored transposed, as MatMul wants it.
3. Blocks are repeated with their values and weights renamed; the markers become standard
   operators that read and write the cache, and experts are repeated inside their block.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import tensor_adapters

from prune_export.exporters.onnx.caches import MARKERS, Caches
from prune_export.exporters.onnx.coding import Chooser, Coding
from prune_export.exporters.onnx.cut import cut
from prune_export.exporters.onnx.dead import Live, live
from prune_export.exporters.onnx.markers import DOMAIN
from prune_export.exporters.onnx.trace import OPSET, Trace
from prune_export.exporters.onnx.widths import Fit

IR_VERSION: Final = 10
_ALWAYS: Final = frozenset({"input_ids", "attention_mask", "position_ids"})
_WRAPPER: Final = "model."  # the prefix that the traced wrapper gives every parameter


@dataclass(frozen=True)
class Weight:
    """An initializer that is still to be written.

    `name` is its name in the graph, `parameter` the torch parameter it holds (or several, merged:
    `parts`), `expert` the expert of a stacked parameter; `transposed` says that the graph wants
    the transpose; `looked_up` that it is only read by row, as an embedding; `coding` how it is
    stored as codes (`name_int8`, `name_scale`, `name_zero`), if it is.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    expert: int | None = None
    transposed: bool = False
    looked_up: bool = False
    coding: Coding | None = None


@dataclass(frozen=True)
class Stamped:
    """A whole graph without its weights."""

    model: Any
    weights: tuple[Weight, ...]


def replicate_blocks(
    trace: Trace, *, last: bool, coding: Chooser | None = None, fit: Fit | None = None
) -> Stamped:
    """Builds the graph of all layers.

    `last` says that it was traced for the last position's logits, `coding` which codes to store
    matrices as. With `fit`, each layer gets its own sizes, and what is dead in it is left out.

    Raises:
        PlanError: the model computes something that does not belong to one block.
    """
    return _Stamper(trace, last, coding, fit).run()


class _Stamper:
    def __init__(self, trace: Trace, last: bool, coding: Chooser | None, fit: Fit | None) -> None:
        self.trace, self.last, self.coding, self.fit = trace, last, coding, fit
        graph = trace.model.graph
        # Of the states, and so of the caches: logits may be float32 in any precision.
        entry = next(node for node in graph if node.op_type == "BlockInput")
        self.dtype = int(entry.outputs[0].dtype)
        self.parameters = {
            value.name: value for value in graph.inputs if value.name.startswith(_WRAPPER)
        }
        self.in_block = re.compile(re.escape(f"{_WRAPPER}{trace.blocks}.") + r"(\d+)\.(.+)")
        self.transposed = self._transposed()
        self.looked_up = {
            name
            for name, value in self.parameters.items()
            if all(map(_is_lookup, self._users(value)))
        }
        self.matrices = self._matrices() if coding else frozenset[str]()
        self.cut = cut(trace, self._stage, self._is_size)
        self.nodes: list[Any] = []
        self._copies: dict[int, Any] = {}
        self.weights: dict[str, Weight] = {}
        self.constants: dict[str, Any] = {}
        self.caches = Caches.of(graph, self.dtype)

    def run(self) -> Stamped:
        graph = self.trace.model.graph
        names = {graph.outputs[0].name: "logits"}
        for node in self.cut.before:
            self._emit(node, names, "before")
        hidden = self.named(self.cut.hidden["enter"], names)
        for layer, kind in enumerate(self.trace.kinds):
            hidden = self._block(layer, kind, names, hidden)
        names[self.cut.hidden["leave"]] = hidden
        for node in self.cut.after:
            self._emit(node, names, "after")
        return Stamped(self._model(), tuple(self.weights.values()))

    def _transposed(self) -> dict[str, str]:
        """Finds values that are a weight's transpose and can be stored transposed.

        As codes a matrix is stored apart from the embedding that it is tied to; otherwise the two
        share their bytes, and the graph transposes.
        """
        found: dict[str, str] = {}
        for name, value in self.parameters.items():
            users = [user for user in value.consumers() if _is_transpose(user)]
            if len(users) == len(value.consumers()) or self.coding:
                found |= {user.outputs[0].name: name for user in users}
        return found

    def _matrices(self) -> frozenset[str]:
        """Finds the weights (or transposes) that are used in matrix products only; no routers."""
        multiplied: set[str] = set()
        otherwise: set[str] = set()
        for node in self.trace.model.graph:
            if node.outputs[0].name not in self.transposed:
                for at, value in enumerate(node.inputs):
                    if value is not None:
                        found = multiplied if (node.op_type, at) == ("MatMul", 1) else otherwise
                        found.add(value.name)
        weights = self.parameters.keys() | self.transposed.keys()
        return frozenset(
            value for value in (multiplied - otherwise) & weights
            if self.transposed.get(value, value).removeprefix(_WRAPPER) not in self.trace.routers
        )  # fmt: skip

    def _stage(self, name: str) -> int:
        """The traced block that a weight belongs to, or -1."""
        match = self.in_block.fullmatch(name)
        return int(match.group(1)) if match else -1

    def _users(self, value: Any) -> list[Any]:
        return [user for user in value.consumers() if user.outputs[0].name not in self.transposed]

    def _block(self, layer: int, kind: int, shared: Mapping[str, str], hidden: str) -> str:
        names = {**shared, self.cut.hidden[f"in {kind}"]: hidden}
        prefix = f"layers.{layer}"
        alive = self._live(layer, kind)
        for node in alive.nodes:
            for value in node.outputs:
                if value.name not in self.transposed:
                    names[value.name] = f"{prefix}.{value.name}"
        inside = iter(alive.nodes)
        for node in inside:
            marker = node.op_type if node.domain == DOMAIN else ""
            if marker in MARKERS:
                self.caches.write(node, layer, names, self)
            elif marker == "ExpertInput":
                self._experts(node, inside, layer, names)
            else:
                self._emit(node, names, prefix, layer, alias=alive.alias)
        out = self.cut.hidden[f"out {kind}"]
        return self.named(alive.alias.get(out, out), names)

    def _live(self, layer: int, kind: int) -> Live:
        nodes = [*self.cut.sized, *self.cut.inside.get(kind, [])]
        if self.fit is None:
            return Live(tuple(nodes), {})
        return live(
            nodes, self.cut.hidden[f"out {kind}"], lambda value: self._is_dead(value.name, layer)
        )

    def _is_dead(self, value: str, layer: int, expert: int | None = None) -> bool:
        """Whether a weight is all zero in a layer, or in one expert of it."""
        match = self.in_block.fullmatch(self.transposed.get(value, value))
        if match is None or self.fit is None:
            return False
        return self.fit.is_dead(f"{self.trace.blocks}.{layer}.{match.group(2)}", layer, expert)

    def _experts(
        self, start: Any, inside: Iterator[Any], layer: int, names: dict[str, str]
    ) -> None:
        """Repeats the one traced expert: each takes its tokens and adds its output for them."""
        template, end = [], start
        for node in inside:
            if node.domain == DOMAIN and node.op_type == "ExpertOutput":
                end = node
                break
            template.append(node)
        hidden, index, weight = (self.named(value.name, names) for value in start.inputs)
        where = f"layers.{layer}.experts"
        total = f"{where}.zero"
        # Sums are float32, also in half precision, in which ONNX Runtime scatters nothing.
        routed = onnx.TensorProto.FLOAT
        weight = self._cast(weight, int(start.inputs[2].dtype), routed, where)
        zero = onnx.helper.make_tensor("value", routed, [1], [0.0])
        self.add("Shape", [hidden], [f"{where}.shape"], where)
        self.add("ConstantOfShape", [f"{where}.shape"], [total], where, value=zero)
        ends = [value.name for node in template for value in node.inputs if value is not None]
        for expert in range(start.attributes["experts"].as_int()):
            if any(self._is_dead(value, layer, expert) for value in ends):
                continue
            own = f"{where}.{expert}"
            number, last = f"expert.{expert}", f"{own}.sum"
            self.constant(number, expert)
            self.add("Equal", [index, number], [f"{own}.hit"], own)
            self.add("NonZero", [f"{own}.hit"], [f"{own}.at"], own)
            self.add("Gather", [f"{own}.at", self.constant("expert.0", 0)], [f"{own}.token"], own)
            self.add("Gather", [hidden, f"{own}.token"], [f"{own}.rows"], own)
            inner = {**names, start.outputs[0].name: f"{own}.rows"}
            for node in template:
                for value in node.outputs:
                    if value.name not in self.transposed:
                        inner[value.name] = f"{own}.{value.name}"
                self._emit(node, inner, own, layer, expert)
            made = self._cast(self.named(end.inputs[0].name, inner), self.dtype, routed, own)
            self.add("Transpose", [f"{own}.at"], [f"{own}.places"], own, perm=[1, 0])
            self.add("GatherND", [weight, f"{own}.places"], [f"{own}.share"], own)
            column = self.constant("minus_one", [-1])
            self.add("Unsqueeze", [f"{own}.share", column], [f"{own}.shares"], own)
            self.add("Mul", [made, f"{own}.shares"], [f"{own}.part"], own)
            self.add("Unsqueeze", [f"{own}.token", column], [f"{own}.tokens"], own)
            self.add("ScatterND", [total, f"{own}.tokens", f"{own}.part"], [last], own,
                      reduction="add")  # fmt: skip
            total = last
        names[end.outputs[0].name] = self._cast(total, routed, self.dtype, where)

    def _cast(self, value: str, dtype: int, wanted: int, where: str) -> str:
        if dtype == wanted:
            return value
        self.add("Cast", [value], [f"{value}_cast"], where, to=wanted)
        return f"{value}_cast"

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = onnx.numpy_helper.from_array(np.asarray(value, np.int64), name)
        return name

    def _emit(
        self,
        node: Any,
        names: Mapping[str, str],
        where: str,
        layer: int = -1,
        expert: int = -1,
        alias: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Adds a copy of a traced node with its values renamed."""
        if node.outputs[0].name in self.transposed:
            return
        copy = self._copies.get(id(node))
        if copy is None:
            copy = self._copies[id(node)] = ir.serde.serialize_node(node)
            del copy.metadata_props[:]
            copy.doc_string = ""
        proto = onnx.NodeProto()
        proto.CopyFrom(copy)
        proto.input[:] = [
            "" if v is None else self.named(alias.get(v.name, v.name), names, layer, expert)
            for v in node.inputs
        ]
        for attribute in proto.attribute:
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = self.sized(attribute.i, layer, expert)
        proto.output[:] = [self.named(value.name, names) for value in node.outputs]
        self._append(proto, where)

    def add(
        self, kind: str, read: list[str], wrote: list[str], where: str, **attributes: Any
    ) -> None:
        self._append(onnx.helper.make_node(kind, read, wrote, **attributes), where)

    def _append(self, proto: Any, where: str) -> None:
        proto.name = f"{where}/{proto.op_type}_{len(self.nodes)}"
        self.nodes.append(proto)

    def named(self, value: str, names: Mapping[str, str], layer: int = -1, expert: int = -1) -> str:
        """A value's name in the whole graph; weights that are read are noted."""
        if self.transposed.get(value, value) in self.parameters:
            return self._weight(value, layer, expert)
        initializer = self.trace.model.graph.initializers.get(value)
        if initializer is None:
            return names.get(value, value)
        if self._is_size(value):
            own = f"layers.{layer}.{value}" if expert < 0 else f"layers.{layer}.{expert}.{value}"
            numbers = np.vectorize(lambda number: self.sized(int(number), layer, expert))
            return self.constant(own, numbers(initializer.const_value.numpy()))
        if value not in self.constants:
            proto = ir.serde.serialize_tensor(initializer.const_value)
            proto.name = value
            proto.doc_string = ""
            self.constants[value] = proto
        return value

    def _is_size(self, value: str) -> bool:
        """Whether a constant is, or holds, a size that differs from layer to layer."""
        initializer = self.trace.model.graph.initializers.get(value)
        if initializer is None or self.fit is None:
            return False
        found = initializer.const_value
        return found.dtype == ir.DataType.INT64 and any(
            self.fit.is_size(int(number)) for number in found.numpy().reshape(-1)
        )

    def sized(self, number: Any, layer: int, expert: int = -1) -> Any:
        """The value in a layer of an integer of the traced graph."""
        if self.fit is None or layer < 0 or not isinstance(number, int):
            return number
        return self.fit.read(number, layer, expert)

    def _weight(self, value: str, layer: int, expert: int) -> str:
        traced, transposed = self.transposed.get(value, value), value in self.transposed
        match = self.in_block.fullmatch(traced)
        path = f"{self.trace.blocks}.{layer}.{match.group(2)}" if match else traced[len(_WRAPPER) :]
        name = path if expert < 0 else f"{path}.{expert}"
        buffer = self.trace.buffers.get(traced[len(_WRAPPER) :])
        if buffer is not None:
            values = tensor_adapters.TorchTensor(buffer, name).numpy()  # numpy has no bfloat16
            self.constants[name] = onnx.numpy_helper.from_array(values, name)
            return name
        which = None if expert < 0 else expert
        coding = self.coding(path, which) if self.coding and value in self.matrices else None
        key = f"{name}_{coding.suffix}" if coding else name
        if key not in self.weights:
            shape = tuple(
                self.sized(int(size), layer, expert) for size in self.parameters[traced].shape
            )
            self.weights[key] = Weight(
                name, path, shape[::-1] if transposed else shape, which, transposed,
                not transposed and traced in self.looked_up, coding,
            )  # fmt: skip
            if coding:
                read = [key, f"{name}_scale", *([f"{name}_zero"] if coding.zeros else [])]
                self.add("DequantizeLinear", read, [f"{name}_dequantized"], name,
                          axis=0, block_size=coding.block)  # fmt: skip
        return f"{name}_dequantized" if coding else name

    def _model(self) -> Any:
        info = onnx.helper.make_tensor_value_info
        integer = onnx.TensorProto.INT64
        inputs = [
            info("input_ids", integer, ["batch", "sequence"]),
            info("attention_mask", integer, ["batch", "total_sequence"]),
            info("position_ids", integer, ["batch", "sequence"]),
        ]
        vocab = int(self.trace.model.graph.outputs[0].shape[-1])
        wide = 1 if self.last else "sequence"
        outputs = [
            info("logits", int(self.trace.model.graph.outputs[0].dtype), ["batch", wide, vocab])
        ]
        inputs += self.caches.inputs
        outputs += self.caches.outputs
        read = {name for node in self.nodes for name in node.input}
        graph = onnx.helper.make_graph(
            self.nodes, "model", [i for i in inputs if i.name in read or i.name in _ALWAYS],
            outputs, [proto for name, proto in self.constants.items() if name in read],
        )  # fmt: skip
        return onnx.helper.make_model(
            graph, producer_name="prune-export", ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )  # fmt: skip


def _is_lookup(node: Any) -> bool:
    return bool(node.op_type == "Gather")


def _is_transpose(node: Any) -> bool:
    return bool(node.op_type == "Transpose" and node.attributes["perm"].as_ints() == (1, 0))
