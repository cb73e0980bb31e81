"""Finds a model's kinds of rotary embedding, and refuses the one that no exporter takes.

            default  linear  yarn  llama3  longrope  dynamic
onnx          yes      yes    yes    yes     yes        no
tensorrt      as onnx, whose graph it builds from
aoti          yes      yes    yes    yes     yes        no
ort_genai     by family: `support`               no
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_export.arch import Arch
from prune_export.errors import PlanError


def rope_kinds(config: Mapping[str, Any]) -> set[str]:
    """The rotary scalings of a full config; `gemma3` has one for each kind of attention."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping):
        return {"default"}
    parts = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]
    return {str(part.get("rope_type") or part.get("type") or "default") for part in parts}


def refuse_untraceable(where: str, arch: Arch) -> None:
    """Refuses what torch.export cannot follow: dynamic rotary scaling, and what models do that.

    Raises:
        PlanError: with what is the same, or runs it.
    """
    refuse_rope(where, arch.config)
    if arch.table.untraceable:
        raise PlanError(
            where,
            f"torch.export cannot follow {arch.family} into a graph that an exporter writes: "
            f"{arch.table.untraceable}",
            "run it in PyTorch: leave the export out",
        )


def refuse_rope(where: str, config: Mapping[str, Any]) -> None:
    """Refuses dynamic rotary scaling, whose frequencies depend on the longest length seen so far.

    Raises:
        PlanError: with what is the same up to the model's own length.
    """
    if "dynamic" in rope_kinds(config):
        raise PlanError(
            where,
            "no exporter takes rotary scaling `dynamic`, whose frequencies follow the longest "
            "sequence so far",
            'write `"rope_type": "default"` into config.json, which is the same up to '
            f"{config.get('max_position_embeddings')} positions, or run it in PyTorch",
        )
