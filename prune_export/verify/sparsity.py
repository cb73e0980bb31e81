"""Measures an engine's sparsity: the patterns of its weights, and whether sparse kernels run.

Three questions, each with its own witness, as the one doesn't follow from the other:

- Which pattern do the weights hold? Counted in the engine's own graph; where the engine keeps none
  (a serialized one), the count from its build.
- Do sparse kernels run? What the builder said of eligible and chosen layers, and the names of the
  kernels. A flag that was set is no proof, and weights that hold a pattern aren't either.
- What do they gain? The same engine with and without them (`measure_speed`), not against dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from prune_export.contracts import BuildRecord
from prune_export.exporter_facts import ExporterFacts
from prune_export.sparsity.patterns import patterns
from prune_export.verify.results import Sparsity, WeightPattern

_FEW: Final = 0.05
"""Weights with a smaller fraction of zeros were not pruned."""


def measure_sparsity(record: BuildRecord, path: Path) -> list[Sparsity]:
    """Measures the sparsity of the engine at `path`; empty where none is there or asked for.

    Raises:
        CheckpointError: its graph cannot be read.
    """
    said = record.sparsity
    weights = _weights(record, path)
    asked = bool(said.get("asked"))
    if not asked and not any(weight.zeros > _FEW for weight in weights):
        return []
    found = Sparsity(
        engine=record.exporter,
        weights=weights,
        asked=asked,
        proven=said.get("proven") if asked else False,
        eligible=said.get("eligible"),
        chosen=said.get("chosen"),
        eligible_layers=list(said.get("eligible_layers", ())),
        chosen_layers=list(said.get("chosen_layers", ())),
        tactics=dict(said.get("tactics", {})),
        note=str(said.get("note") or _note(record.exporter, asked=asked)),
    )
    return [found]


def not_from_rounding(
    found: Sequence[Sparsity], record: BuildRecord, *, zeros_made: bool
) -> list[Sparsity]:
    """Filters patterns to report: without a sparse stage, zeros of quantized weights are rounding.

    In int4 an eighth of a dense model's weights are.
    """
    quantized = str(record.parameters.get("precision", "")).startswith("int")
    return [
        one
        for one in found
        if zeros_made or not quantized or one.asked or any(weight.pattern for weight in one.weights)
    ]


def _note(exporter: str, *, asked: bool) -> str:
    note = ExporterFacts.of_name(exporter).sparse_note
    return note.asked if asked else note.unasked


def _weights(record: BuildRecord, path: Path) -> list[WeightPattern]:
    graph = path / record.graph
    if graph.suffix == ".onnx":
        return [WeightPattern(**asdict(one)) for one in patterns(graph)]
    counted: list[Mapping[str, Any]] = record.sparsity.get("weights", {}).get("held", [])
    return [WeightPattern(**one) for one in counted]
