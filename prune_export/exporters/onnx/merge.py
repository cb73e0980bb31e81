"""Merges matrix products that share an input into one: q, k, v; gate and up.

A decoding step of a small model spends a good part of its time on starting operators; one product
and a split start fewer threads than three products. The parts of a merged weight are in its name:
`self_attn.q_proj+k_proj+v_proj.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir

_TOGETHER: Final = "+"


def parts(parameter: str) -> list[str]:
    """The torch parameters that a merged weight's name lists, in the order of their outputs."""
    if _TOGETHER not in parameter:
        return [parameter]
    stem, joined, leaf = parameter.rsplit(".", 2)
    return [f"{stem}.{name}.{leaf}" for name in joined.split(_TOGETHER)]


def merge_matrices(model: Any, alone: Collection[str]) -> None:
    """Merges the products of sibling weights (inputs `model.….weight`) that are not in `alone`."""
    for number, group in enumerate(list(_siblings(model.graph, alone))):
        _merge(model.graph, group, number)


def _siblings(graph: Any, alone: Collection[str]) -> Iterator[list[Any]]:
    """Groups products of one input with weights of one module, in the order of the graph."""
    groups: dict[tuple[int, str, str], list[Any]] = {}
    for node in graph:
        weight = _weight(node) if node.op_type == "MatMul" else None
        if weight is not None and weight.name not in alone:
            stem, _, leaf = weight.name.rsplit(".", 2)
            groups.setdefault((id(node.inputs[0]), stem, leaf), []).append(node)
    return (group for group in groups.values() if len(group) > 1)


def _weight(product: Any) -> Any:
    """The parameter `[outputs, inputs]` that this product alone reads, transposed; else None."""
    turn = product.inputs[1].producer()
    if turn is None or turn.op_type != "Transpose" or len(product.inputs[1].consumers()) != 1:
        return None
    weight = turn.inputs[0]
    plain = weight.is_graph_input() and weight.name.startswith("model.")
    return weight if plain and len(weight.consumers()) == 1 and weight.shape.rank() == 2 else None


def _merge(graph: Any, group: list[Any], number: int) -> None:
    weights = [_weight(node) for node in group]
    sizes = [int(weight.shape[0]) for weight in weights]
    stem, _, leaf = weights[0].name.rsplit(".", 2)
    names = _TOGETHER.join(weight.name.rsplit(".", 2)[1] for weight in weights)
    dtype, inner = weights[0].dtype, int(weights[0].shape[1])
    merged = _value(f"{stem}.{names}.{leaf}", [sum(sizes), inner], dtype)
    graph.inputs.append(merged)
    lengths = _value(f"split_{number}", [len(sizes)], ir.DataType.INT64)
    lengths.const_value = ir.tensor(np.array(sizes, np.int64), name=lengths.name)
    graph.register_initializer(lengths)
    before = list(group[0].outputs[0].shape[:-1])
    turned = _value(f"merged_{number}_turned", [inner, sum(sizes)], dtype)
    product = _value(f"merged_{number}", [*before, sum(sizes)], dtype)
    pieces = [
        _value(f"merged_{number}_{at}", [*before, size], dtype) for at, size in enumerate(sizes)
    ]
    graph.insert_before(
        group[0],
        [
            ir.Node("", "Transpose", [merged], [ir.AttrInt64s("perm", [1, 0])], outputs=[turned]),
            ir.Node("", "MatMul", [group[0].inputs[0], turned], outputs=[product]),
            ir.Node("", "Split", [product, lengths], [ir.AttrInt64("axis", -1)], outputs=pieces),
        ],
    )
    for node, piece in zip(group, pieces, strict=True):
        node.outputs[0].replace_all_uses_with(piece)


def _value(name: str, shape: list[Any], dtype: Any) -> Any:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
