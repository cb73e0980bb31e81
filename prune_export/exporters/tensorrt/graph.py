"""Rewrites our ONNX graph for TensorRT's parser.

1. TensorRT's `Attention` has one output and no cache: past and new keys and values are joined by a
   Concat each, whose result is both the cache and what attention reads, heads first. This is
   standard ONNX and computes the same, so any runtime can check it.
2. Where TensorRT has no fused kernel for an attention (float32, small heads), it refuses unless the
   node may be taken apart. The attribute that says so is its own, so it is written last.

Source: onnx-tensorrt, `importAttention` and `TRT_decomposable` (10.15 and later).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from prune_export.sparsity.onnx_weights import load

_HEADS_FORWARD: Final = (0, 2, 1, 3)


def adapt(graph: Path) -> None:
    """Does both rewrites of the graph at `graph`, in place; its external data stay as they are."""
    model = load(graph)
    split_caches(model)
    allow_decomposition(model)
    graph.write_bytes(model.SerializeToString(deterministic=True))


def split_caches(model: Any) -> int:
    """Rewrites every `Attention` that reads a past, in place; gives their number."""
    nodes = list(model.graph.node)
    rewriter = _Rewriter(model.graph)
    del model.graph.node[:]
    found = 0
    for node in nodes:
        if node.op_type == "Attention" and len(node.output) > 1:
            model.graph.node.extend(rewriter.attention(node))
            found += 1
        else:
            model.graph.node.append(node)
    return found


def allow_decomposition(model: Any) -> None:
    """Allows TensorRT to run attention as products and a softmax; other runtimes refuse it then."""
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("TRT_decomposable", 1))


class _Rewriter:
    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._known = {value.name for value in graph.initializer}

    def attention(self, node: Any) -> Iterator[Any]:
        """Replaces an attention with `[batch, new, width]` or 4-D inputs by new nodes."""
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        heads = [given.pop(name, 0) for name in ("q_num_heads", "kv_num_heads")]
        mask, pasts, output = node.input[3], node.input[4:6], node.output[0]
        read = []
        for name, count in zip(node.input[:3], (heads[0], heads[1], heads[1]), strict=True):
            if count:
                yield from self._forward(node.name, name, count)
                read.append(f"{node.name}/{name}/heads")
            else:
                read.append(name)
        for new, past, both in zip(read[1:], pasts, node.output[1:3], strict=True):
            yield self._node("Concat", [past, new], both, axis=2)
        made = f"{node.name}/heads" if heads[0] else output
        yield self._node("Attention", [read[0], *node.output[1:3], mask], made, **given)
        if heads[0]:
            turned = f"{node.name}/turned"
            yield self._node("Transpose", [made], turned, perm=_HEADS_FORWARD)
            joined = self._constant("attention/join_heads", [0, 0, -1])
            yield self._node("Reshape", [turned, joined], output)

    def _forward(self, where: str, value: str, heads: int) -> Iterator[Any]:
        shape = self._constant(f"attention/{heads}_heads", [0, 0, heads, -1])
        apart = f"{where}/{value}/apart"
        yield self._node("Reshape", [value, shape], apart)
        yield self._node("Transpose", [apart], f"{where}/{value}/heads", perm=_HEADS_FORWARD)

    def _node(self, kind: str, read: list[str], wrote: str, **attributes: Any) -> Any:
        return onnx.helper.make_node(kind, read, [wrote], name=f"{wrote}/{kind}", **attributes)

    def _constant(self, name: str, values: list[int]) -> str:
        if name not in self._known:
            array = np.array(values, np.int64)
            self._graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            self._known.add(name)
        return name
