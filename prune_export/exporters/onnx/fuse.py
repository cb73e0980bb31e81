"""Folds constants, and fuses norms and rotary embeddings into operators of opset 23."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import onnx_ir as ir
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions, pattern

from prune_export.exporters.onnx.layout import flatten_heads
from prune_export.exporters.onnx.merge import merge_matrices

_PASSES_THROUGH: Final = frozenset({"Cos", "Sin", "Cast", "Mul"})


def optimize(model: Any, domain: str, names: Collection[str], alone: Collection[str]) -> None:
    """Optimizes an `onnx_ir.Model` whose initializers `names` are parameters and buffers.

    `domain` is that of the markers, `alone` are weights that no other is merged with. The weights
    become graph inputs: as constants they would be folded, and equal ones merged. What the model's
    code makes while it is traced, such as a list of longrope's factors, is a constant.
    """
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name in names]
    for value in weights:
        del graph.initializers[value.name]
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model)
    onnx_fusions.fuse(model)
    _widen_norms(graph)
    rules = [_ScaledRotary.rule(), _GemmAsMatMul.rule()]
    pattern.RewriteRuleSet(rules).apply_to_model(model)
    merge_matrices(model, alone)
    flatten_heads(model, domain)
    optimizer.optimize_ir(model)


def _widen_norms(graph: Any) -> None:
    """Makes a norm whose scale is wider than its input compute in the scale's type.

    So does PyTorch in half precision, where the scale is `1 + weight` in float32. The operator
    allows two types, and ONNX Runtime then builds a product of both, which it refuses.
    """
    for node in list(graph):
        if node.op_type == "RMSNormalization" and not node.domain:
            read, scale = node.inputs[:2]
            if scale.dtype is not None and read.dtype not in (None, scale.dtype):
                cast = ir.Node("", "Cast", [read], [ir.AttrInt64("to", int(scale.dtype))])
                wide = cast.outputs[0]
                wide.name = f"{node.outputs[0].name}_wide"
                wide.shape, wide.dtype = read.shape, scale.dtype
                graph.insert_before(node, cast)
                node.replace_input_with(0, wide)


class _ScaledRotary(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Fuses a rotary embedding whose cosines were scaled (long contexts) or rounded (fp16).

    onnxscript's own rule knows only cosines that are used as computed.
    """

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, ends: Any, starts: Any) -> Any:
        first = op.Slice(x, [0], ends, [3], [1])
        second = op.Slice(x, starts, pattern.ANY_VALUE, [3], [1])
        turned = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + turned * op.Unsqueeze(sin, [1])

    def check(self, context: Any, x: Any, cos: Any, sin: Any, ends: Any, starts: Any) -> bool:
        size = x.shape[3] if x.shape is not None and len(x.shape) == 4 else None
        halves = [value.const_value for value in (ends, starts)]
        return (
            isinstance(size, int)
            and isinstance(x.shape[1], int)
            and all(half is not None and half.numpy().tolist() == [size // 2] for half in halves)
            and _repeats(cos)
            and _repeats(sin)
        )

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, ends: Any, starts: Any) -> Any:
        def half(value: Any) -> Any:
            return op.Slice(value, op.Constant(value_ints=[0]), ends, op.Constant(value_ints=[2]))

        return op.RotaryEmbedding(x, half(cos), half(sin), interleaved=0, num_heads=x.shape[1])


class _GemmAsMatMul(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """Rewrites a Gemm as a MatMul and an Add: one form for every weight."""

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        return op.Gemm(
            x, weight,
            _allow_other_inputs=True, _allow_other_attributes=True, _outputs=["product"],
        )  # fmt: skip

    def check(self, context: Any, product: Any, **_: Any) -> bool:
        given = product.producer().attributes
        return all(
            given[name].value == plain
            for name, plain in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))
            if name in given
        )

    def rewrite(self, op: Any, x: Any, weight: Any, product: Any) -> Any:
        node = product.producer()
        turned = node.attributes.get("transB")
        if turned is not None and turned.value:
            weight = op.Transpose(weight, perm=[1, 0])
        result = op.MatMul(x, weight)
        return op.Add(result, node.inputs[2]) if len(node.inputs) > 2 else result


def _repeats(value: Any) -> bool:
    """Whether the second half of the last dimension repeats the first."""
    while (node := value.producer()) is not None:
        if node.op_type == "Concat":
            return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
        if node.op_type not in _PASSES_THROUGH:
            return False
        if node.op_type == "Mul" and (
            node.inputs[1].const_value is None or node.inputs[1].const_value.size != 1
        ):
            return False
        value = node.inputs[0]
    return False
