"""Packs an engine's weights, and shows that its kernel runs and computes what it did before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from prune_export.contracts import Runner
from prune_export.errors import StageError
from prune_export.exporters._shared.logit_check import PROMPT
from prune_export.exporters._shared.packed_graph import PackedGraph, Zeros, pack_graph
from prune_export.exporters._shared.packed_keys import sparsity_of
from prune_export.kernels import LIBRARY, Library
from prune_export.machine import Machine
from prune_export.numeric.logits import largest_error

_TOLERANCE: Final = 5e-2
"""Largest difference of logits, as a fraction of the largest: both round activations to int8."""


class _Opens(Protocol):
    def open(self, path: Path, machine: Machine) -> Runner: ...


@dataclass(frozen=True)
class PackedEngine:
    """What was packed, how far logits moved, and how often a step calls the operator."""

    graph: PackedGraph
    error: float
    calls: int
    instructions: str

    @property
    def added_bytes(self) -> int:
        """The bytes that a step reads more than before; below zero where it reads fewer."""
        return self.graph.after_bytes - self.graph.before_bytes

    def notes(self) -> tuple[str, str]:
        """Sentences for the build record."""
        return self.graph.note(), (
            f"packed weights: {self.calls} calls of the kernel in a step, here with "
            f"{self.instructions}; logits within {self.error:.1e} of those before packing"
        )

    def sparsity(self, packed: str) -> Mapping[str, Any]:
        """What the build record says of sparse kernels."""
        return sparsity_of(self.graph, self.calls, packed)


def pack_engine(
    graph: Path, zeros: Zeros, plain: _Opens, packed: _Opens, machine: Machine
) -> PackedEngine:
    """Packs the weights of the graph at `graph`; `plain` opens it before, and `packed` after.

    Raises:
        StageError: nothing can be packed, the kernel does not run, or it computes something else.
    """
    before = _logits(plain, graph.parent, machine)[0]
    made = pack_graph(graph, zeros)
    library = Library(graph.with_name(LIBRARY))
    after, calls = _logits(packed, graph.parent, machine, library)
    error = largest_error(before, after) / float(np.abs(before).max())
    if not error <= _TOLERANCE:  # so put, it is true of what is not a number
        raise StageError(
            f"{graph}  packed",
            f"logits differ by {error:.2g} of the largest from those before packing, expected at "
            f"most {_TOLERANCE:g}",
            "report this bug of the kernel with the model's config, and leave `packed` out",
        )
    if calls != made.nodes:
        raise StageError(
            f"{graph}  packed",
            f"a step called the kernel {calls} times, expected {made.nodes}",
            "report this with the recipe: the runtime does not run the graph as it is written",
        )
    return PackedEngine(made, error, calls, library.instructions)


def _logits(
    exporter: _Opens, path: Path, machine: Machine, library: Library | None = None
) -> tuple[np.ndarray, int]:
    """Logits of a prompt and a step, and how often the step called the operator."""
    with exporter.open(path, machine) as runner:
        vocabulary = runner.step(np.zeros((1, 1), np.int64))[0].shape[-1]
        runner.reset()
        ids = np.random.default_rng(0).integers(0, vocabulary, (1, PROMPT + 1))
        prompt, _ = runner.step(ids[:, :PROMPT])
        seen = library.calls if library else 0
        step, _ = runner.step(ids[:, PROMPT:])
        called = library.calls - seen if library else 0
    return np.concatenate([prompt, step], axis=1), called
