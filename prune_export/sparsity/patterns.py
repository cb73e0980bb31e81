"""Finds which N:M pattern the weights of a graph have, by counting weight by weight.

A pattern is at most `keep` non-zeros in every `of` neighbouring inputs of each output. A weight may
hold several; the one of the smallest group is reported, as 2 of 4 is what hardware knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import Matrix, load, matrices
from prune_export.sparsity.slidesparse import fullest

GROUPS: Final = (4, 8, 16, 6, 10, 12, 14)
"""Sizes of groups that are counted, in the order in which a pattern is reported."""


@dataclass(frozen=True)
class Achieved:
    """The sparsity of a weight in a graph: its size, fraction of zeros, and pattern or ''."""

    name: str
    inputs: int
    outputs: int
    zeros: float
    pattern: str


def patterns(graph: Path) -> list[Achieved]:
    """Measures every weight matrix of the ONNX graph at `graph`, in graph order.

    Raises:
        CheckpointError: it is not a graph, or its data are missing.
    """
    found: dict[str, Achieved] = {}
    for matrix in matrices(load(graph), graph.parent):
        if matrix.name not in found:
            found[matrix.name] = achieved(matrix)
    return list(found.values())


def achieved(matrix: Matrix) -> Achieved:
    """Measures the sparsity of a matrix."""
    return counted(matrix.name, matrix.nonzero())


def counted(name: str, nonzero: np.ndarray) -> Achieved:
    """Makes the sparsity of the weight of this name from `nonzero` bool `[in, out]`."""
    inputs, outputs = nonzero.shape
    zeros = 1 - int(np.count_nonzero(nonzero)) / max(nonzero.size, 1)
    nm = pattern_held(nonzero) if zeros >= 1 / max(GROUPS) else None
    return Achieved(name, inputs, outputs, zeros, str(nm) if nm else "")


def pattern_held(nonzero: np.ndarray) -> Nm | None:
    """Finds the tightest pattern of the smallest of `GROUPS` that `nonzero` `[in, out]` has."""
    for of in GROUPS:
        most = fullest(nonzero, of)
        if most < of:
            return Nm(max(most, 1), of)
    return None
