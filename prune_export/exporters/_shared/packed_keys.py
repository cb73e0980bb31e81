"""The recipe key `packed` of exporters that can store weights packed, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from prune_export.errors import PlanError
from prune_export.kernels.packing import takes_group

if TYPE_CHECKING:
    from prune_export.exporters._shared.packed_graph import PackedGraph

Packing = Annotated[
    Literal["no", "sparse", "dense"],
    Field(
        description="store matrices for our own kernel on CPUs, which is compiled at export: "
        "`sparse` without their zeros where that is smaller, `dense` with them. The engine then "
        "holds machine code. In fp32, matrices of bf16 numbers are stored as such, exactly"
    ),
]


def refuse_unpackable(exporter: str, packed: str, precision: str, block: int, tune: bool) -> None:
    """Refuses keys with which the kernel has nothing that it can multiply.

    Raises:
        PlanError: another precision than int8, int4 or fp32, blocks that it does not have, or
            `tune`, which tries settings of the runtime's own products.
    """
    if packed == "no":
        return
    if tune:
        raise PlanError(
            f"{exporter}.packed",
            "got `tune: true` too, which times the runtime's own products, not our kernel",
            "leave `tune` or `packed` out",
        )
    if precision not in ("int8", "int4", "fp32"):
        raise PlanError(
            f"{exporter}.packed",
            f"got `precision: {precision}`, and the kernel has int8, int4 and, in fp32, bf16",
            "write `precision: int8`, `int4` or `fp32`, or leave `packed` out",
        )
    if precision != "fp32" and not takes_group(block):
        raise PlanError(
            f"{exporter}.packed",
            f"got `block_size: {block}`, and the kernel has blocks of 32, 64, 128 and 256",
            "write `block_size: 128`, which has the fewest bytes of scales",
        )


def sparsity_of(graph: PackedGraph, calls: int, packed: str) -> Mapping[str, Any]:
    """What a build record says of the sparse kernel, which `calls` a step have shown to run."""
    if packed != "sparse":
        return {}
    return {
        "asked": True,
        "proven": bool(graph.sparse) and calls == graph.nodes,
        "eligible": len(graph.layouts),
        "chosen": len(graph.sparse),
        "eligible_layers": list(graph.layouts),
        "chosen_layers": list(graph.sparse),
        "note": "our own kernel, whose calls in a step were counted",
        "tactics": {name: f"PackedMatMul, {graph.layouts[name]}" for name in graph.sparse},
    }
