"""Writes what reads and writes the cache of a whole graph: keys and values, and recurrent states.

| of | input, output | shape |
|---|---|---|
| attention | `past_key_values.{i}.key`, `.value` → `present.{i}.…` | batch, heads, past, size |
| a convolution | `past_key_values.{i}.conv_state` | batch, channels, kernel |
| a recurrence | `past_key_values.{i}.recurrent_state`, float32 | batch, heads, n, p |

States start as zeros. Where a model has them `i` is the number of the block; else caches are
counted without gaps, as runtimes do, whatever blocks have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import onnx

from prune_export.exporters.onnx.markers import DOMAIN

_FLOAT: Final = onnx.TensorProto.FLOAT
_ENDLESS: Final = 2**62


class Writer(Protocol):
    """What writes the nodes of the whole graph."""

    def add(
        self, kind: str, read: list[str], wrote: list[str], where: str, **attributes: Any
    ) -> None:
        """Adds a node."""

    def constant(self, name: str, value: Any) -> str:
        """Adds an integer constant; gives its name."""

    def named(self, value: str, names: Mapping[str, str]) -> str:
        """The name that a traced value has in the whole graph."""

    def sized(self, number: Any, layer: int) -> Any:
        """The value in a layer of an integer of the traced graph."""


@dataclass
class Caches:
    """The caches of the whole graph, as its blocks are written; `dtype` is the model's."""

    dtype: int
    by_block: bool
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    attentions: int = 0

    @staticmethod
    def of(graph: Any, dtype: int) -> Caches:
        """Makes the caches for a traced graph, none of which is written yet."""
        states = any(node.domain == DOMAIN and node.op_type in STATES for node in graph)
        return Caches(dtype, states)

    def write(self, node: Any, layer: int, names: dict[str, str], writer: Writer) -> None:
        """Writes what a marker stands for."""
        if node.op_type == "Shift":
            self._shift(node, layer, names, writer)
        elif node.op_type == "Recurrence":
            self._recur(node, layer, names, writer)
        else:
            self._attend(node, layer, names, writer)

    def _declare(self, number: int, part: str, shape: list[Any], dtype: int) -> tuple[str, str]:
        """Adds an input and an output of the graph; a size of `past` grows."""
        names = f"past_key_values.{number}.{part}", f"present.{number}.{part}"
        info = onnx.helper.make_tensor_value_info
        for found, name, length in zip(
            (self.inputs, self.outputs), names, ("past_sequence", "total_sequence"), strict=True
        ):
            sizes = [length if size == "past" else size for size in shape]
            found.append(info(name, dtype, ["batch", *sizes]))
        return names

    def _attend(self, node: Any, layer: int, names: dict[str, str], writer: Writer) -> None:
        at = 1 if node.op_type == "Attention" else 0
        number = layer if self.by_block else self.attentions
        self.attentions += 1
        past, present = [], []
        for part, value in zip(("key", "value"), node.outputs[at : at + 2], strict=True):
            heads = writer.sized(int(value.shape[1]), layer)
            old, new = self._declare(number, part, [heads, "past", int(value.shape[3])], self.dtype)
            past.append(old)
            present.append(new)
            names[value.name] = new
        read = [writer.named(value.name, names) for value in node.inputs]
        where = f"layers.{layer}"
        if node.op_type == "Attention":
            wrote = [writer.named(node.outputs[0].name, names), *present]
            given = {
                name: writer.sized(attr.value, layer)
                for name, attr in node.attributes.items()
                if name != "block"
            }
            writer.add("Attention", [*read, *past], wrote, where, **given)
            return
        for old, new, both in zip(past, read, present, strict=True):
            writer.add("Concat", [old, new], [both], where, axis=2)

    def _shift(self, node: Any, layer: int, names: dict[str, str], writer: Writer) -> None:
        kept = node.attributes["kept"].as_int()
        channels = int(node.inputs[0].shape[1])
        past, present = self._declare(layer, "conv_state", [channels, kept], self.dtype)
        read = writer.named(node.inputs[0].name, names)
        wrote = writer.named(node.outputs[0].name, names)
        where = f"layers.{layer}"
        writer.add("Concat", [past, read], [wrote], where, axis=2)
        ends = [
            writer.constant(name, [value])
            for name, value in ((f"last.{kept}", -kept), ("end", _ENDLESS), ("axis.2", 2))
        ]
        writer.add("Slice", [wrote, *ends], [present], where)

    def _recur(self, node: Any, layer: int, names: dict[str, str], writer: Writer) -> None:
        query, value = node.inputs[0], node.inputs[2]
        shape = [int(query.shape[2]), int(query.shape[4]), int(value.shape[4])]
        past, present = self._declare(layer, "recurrent_state", shape, _FLOAT)
        read = [writer.named(value.name, names) for value in node.inputs]
        wrote = writer.named(node.outputs[0].name, names)
        writer.add(
            "Scan", [past, *read], [present, wrote], f"layers.{layer}",
            body=_step(corrects=len(read) > 4), num_scan_inputs=len(read),
        )  # fmt: skip


STATES: Final = ("Shift", "Recurrence")
MARKERS: Final = ("Attention", "Append", *STATES)
"""What `Caches.write` knows."""


def _step(*, corrects: bool) -> Any:
    """The graph of one token: state and its query, key, value, decay (and β) → state, output."""
    node, info = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [node("Mul", ["state", "decay"], ["decayed"])]
    update = "value"
    if corrects:
        nodes += [
            node("Transpose", ["key"], ["key_row"], perm=[0, 1, 3, 2]),
            node("MatMul", ["key_row", "decayed"], ["known"]),
            node("Sub", ["value", "known"], ["wrong"]),
            node("Mul", ["wrong", "beta"], ["update"]),
        ]
        update = "update"
    nodes += [
        node("Mul", ["key", update], ["written"]),
        node("Add", ["decayed", "written"], ["next"]),
        node("MatMul", ["query", "next"], ["out"]),
    ]
    given = ["state", "query", "key", "value", "decay", *(["beta"] if corrects else [])]
    return onnx.helper.make_graph(
        nodes, "token", [info(name, _FLOAT, None) for name in given],
        [info(name, _FLOAT, None) for name in ("next", "out")],
    )  # fmt: skip
