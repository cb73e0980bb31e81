"""Graphs that are not a plain chain of blocks are refused; int8 rounds as it says."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

from prune_export.errors import PlanError
from prune_export.exporters.onnx.coding import dequantize, quantize
from prune_export.exporters.onnx.markers import DOMAIN
from prune_export.exporters.onnx.replicate import replicate_blocks
from prune_export.exporters.onnx.trace import Trace


def chain(between: str | None = None, over: bool = False) -> Trace:
    """Two traced blocks, each a Neg; `between` puts an operator between them, `over` a residual."""
    nodes: list[ir.Node] = []

    def add(kind: str, *read: ir.Value, domain: str = "", **attributes: int) -> ir.Value:
        given = [ir.AttrInt64(key, value) for key, value in attributes.items()]
        nodes.append(ir.Node(domain, kind, list(read), given, name=f"n{len(nodes)}"))
        value = nodes[-1].outputs[0]
        value.name, value.type = f"v{len(nodes)}", ir.TensorType(ir.DataType.FLOAT)
        return value

    given = ir.Value(
        name="input_ids", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    hidden, skipped = given, given
    for block in range(2):
        entered = add("BlockInput", hidden, domain=DOMAIN, block=block)
        inside = add("Neg", entered)
        if over and block:
            inside = add("Add", inside, skipped)
        skipped = inside
        hidden = add("BlockOutput", inside, domain=DOMAIN, block=block)
        if between and not block:
            hidden = add(between, hidden)
    out = add("Abs", hidden)
    out.shape, out.type = ir.Shape([2, 3]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([given], [out], nodes=nodes, opset_imports={"": 23, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=10)
    return Trace(model, "model.layers", (0, 1, 0), {}, {}, str, 1.0, frozenset())


def test_a_chain_is_stamped_in_the_order_of_its_layers() -> None:
    graph = replicate_blocks(chain(), last=False).model.graph
    assert [node.op_type for node in graph.node] == ["Neg", "Neg", "Neg", "Abs"]
    assert list(graph.node[0].input) == ["input_ids"]
    for before, after in zip(graph.node, graph.node[1:], strict=False):
        assert list(before.output) == list(after.input)
    assert list(graph.node[-1].output) == ["logits"]
    assert len({node.name for node in graph.node}) == 4


def test_a_computation_between_blocks_is_refused() -> None:
    with pytest.raises(PlanError, match="not a plain chain"):
        replicate_blocks(chain(between="Abs"), last=False)


def test_a_residual_past_a_block_is_refused() -> None:
    with pytest.raises(PlanError, match="reads several blocks"):
        replicate_blocks(chain(over=True), last=False)


def test_int8_rounds_each_block_of_rows_by_its_largest() -> None:
    matrix = torch.tensor([[127.0, 0.4], [-63.6, 0.0], [2.54, -1.0]])
    values, scale = quantize(matrix, block=2)
    # Column 0: rows 0 and 1 by 127 / 127 = 1, row 2 by 2.54 / 127 = 0.02; column 1 likewise.
    assert torch.allclose(scale, torch.tensor([[1.0, 0.4 / 127], [0.02, 1.0 / 127]]))
    assert values.tolist() == [[127, 127], [-64, 0], [127, -127]]
    assert torch.allclose(
        dequantize(values, scale, block=2),
        torch.tensor([[127.0, 0.4], [-64.0, 0.0], [2.54, -1.0]]),
    )


def test_int8_of_zeros_is_zero() -> None:
    values, scale = quantize(torch.zeros(40, 2), block=32)
    assert scale.shape == (2, 2)
    assert not dequantize(values, scale, block=32).any()


def test_int8_is_within_half_a_step() -> None:
    matrix = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    values, scale = quantize(matrix, block=32)
    steps = scale.repeat_interleave(32, dim=0)[:70]
    assert ((dequantize(values, scale, block=32) - matrix).abs() <= steps * 0.5001).all()
