"""Records the evidence of sparse kernels in a build: requested, eligible, chosen, kernel names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from prune_export.exporters.tensorrt.layers import Layer, sparse_tactics
from prune_export.exporters.tensorrt.log import Layers, Log, sparsity_said
from prune_export.sparsity.patterns import patterns

HARDWARE: Final = frozenset({"1 of 4", "2 of 4"})
"""Patterns that sparse tensor cores take."""


def counted(graph: Path) -> Mapping[str, Any]:
    """Counts the 2:4 matrices of a graph; gives the names of the others, and each one's pattern."""
    found = patterns(graph)
    dense = [one.name for one in found if one.pattern not in HARDWARE]
    return {
        "matrices": len(found),
        "two_of_four": len(found) - len(dense),
        "others": dense,
        "held": [asdict(one) for one in found],
    }


def record(
    asked: bool, log: Log, layers: Sequence[Layer] | None, weights: Mapping[str, Any]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Makes the build record's `sparsity`, and a sentence that says it.

    `proven` is True where a kernel for sparse weights is named or the builder says that it chose
    one, False where it says that it chose none or no weight holds 2 of 4, None where nothing can be
    known from the build.
    """
    said = sparsity_said(text for _, text in log.lines)
    tactics = dict(sparse_tactics(layers or ()))
    named = any(layer.tactic for layer in layers or ())
    able = asked and bool(weights["two_of_four"])
    proven = _proven(able, said.chosen, tactics, named)
    found = {
        "asked": asked,
        "weights": dict(weights),
        "proven": proven,
        "eligible": said.eligible.count if said.eligible else None,
        "chosen": said.chosen.count if said.chosen else None,
        "eligible_layers": list(said.eligible.names) if said.eligible else [],
        "chosen_layers": list(said.chosen.names) if said.chosen else [],
        "tactics": tactics,
        "layers": len(layers) if layers is not None else None,
    }
    return found, (_sentence(found),) if asked else ()


def _proven(
    able: bool, chosen: Layers | None, tactics: Mapping[str, str], named: bool
) -> bool | None:
    if not able:
        return False
    if tactics or (chosen and chosen.count):
        return True
    return False if chosen or named else None


def _sentence(found: Mapping[str, Any]) -> str:
    if not found["weights"]["two_of_four"]:
        return "sparse kernels: none; no weight holds 2 of 4"
    if found["proven"]:
        count = found["chosen"] if found["chosen"] is not None else len(found["tactics"])
        return f"sparse kernels: {count} layers run them, of {_eligible(found)} eligible"
    if found["proven"] is None:
        return (
            "sparse kernels: allowed; whether one runs is decided on the device and unproven "
            "until it is profiled there"
        )
    if found["eligible"]:
        return (
            f"sparse kernels: none; {found['eligible']} layers were eligible, and the builder "
            "found dense kernels faster"
        )
    return "sparse kernels: none; the builder found no layer eligible"


def _eligible(found: Mapping[str, Any]) -> str:
    return "an unknown number" if found["eligible"] is None else str(found["eligible"])
