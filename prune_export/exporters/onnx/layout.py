"""Removes transposes of heads around attention: inputs and output are `[batch, new, width]`.

PyTorch moves the heads forward and back again; the operators of opset 23 read and write either way.
Without the moves a decoding step of a small model is a few percent faster. Where something else
stands between a projection and its attention (a rotation of a part of each head), nothing changes.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx_ir as ir

_HEADS_FORWARD: Final = (0, 2, 1, 3)


def flatten_heads(model: Any, domain: str) -> None:
    """Rewrites `Attention` markers of `domain` whose inputs are only transposed heads."""
    for node in list(model.graph):
        if node.domain == domain and node.op_type == "Attention":
            found = _flat_output(node)
            if found is not None and all(map(_is_moved, node.inputs[:3])):
                heads = [int(value.shape[1]) for value in node.inputs[:2]]
                for at in range(3):
                    node.replace_input_with(at, _flat(model.graph, node.inputs[at]))
                node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", heads[0])
                node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads[1])
                node.outputs[0].shape = found.shape
                found.replace_all_uses_with(node.outputs[0])


def _flat_output(node: Any) -> Any:
    """The value that has the attention's heads transposed back and joined, or None."""
    value = node.outputs[0]
    for kind in ("Transpose", "Reshape"):
        users = list(value.consumers())
        if len(users) != 1 or users[0].op_type != kind:
            return None
        if kind == "Transpose" and not _moves_heads(users[0]):
            return None
        value = users[0].outputs[0]
    return value if value.shape is not None and len(value.shape) == 3 else None


def _is_moved(value: Any) -> bool:
    """Whether `[batch, heads, new, size]` is a projection with heads transposed (and rotated)."""
    node = value.producer()
    if node is None or value.shape is None or len(value.shape) != 4:
        return False
    if node.op_type == "RotaryEmbedding":
        return len(value.consumers()) == 1 and _is_moved(node.inputs[0])
    return bool(node.op_type == "Transpose" and _moves_heads(node))


def _flat(graph: Any, value: Any) -> Any:
    """Makes the same values with layout `[batch, new, heads * size]`."""
    node = value.producer()
    batch, heads, new, size = value.shape
    shape = ir.Shape([batch, new, int(heads) * int(size)])
    if node.op_type == "RotaryEmbedding":
        node.replace_input_with(0, _flat(graph, node.inputs[0]))
        value.shape = shape
        return value
    apart = node.inputs[0]
    split = apart.producer()
    if split is not None and split.op_type == "Reshape" and split.inputs[0].shape == shape:
        return split.inputs[0]
    joined = ir.Node("", "Reshape", [apart, _joining(graph)])
    joined.outputs[0].name = f"{value.name}_flat"
    joined.outputs[0].shape, joined.outputs[0].dtype = shape, value.dtype
    graph.insert_after(node, joined)
    return joined.outputs[0]


def _joining(graph: Any) -> Any:
    name = "join_heads"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array([0, 0, -1], np.int64), name=name)
        graph.register_initializer(ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]


def _moves_heads(node: Any) -> bool:
    return tuple(node.attributes["perm"].as_ints()) == _HEADS_FORWARD
