"""Rounds every weight to the nearest value of its group's grid: fast, without data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import ExtraPass, ModelView, as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Decision
from prune_export.grids import Grid, nearest_grid
from prune_export.pruning.quantize.method import QuantizeMethod, decision
from prune_export.surgery import Overwrite


@dataclass(frozen=True)
class Rtn(QuantizeMethod):
    """Round every weight to the nearest code: fast, needs no data, and costs quality in 4 bits.

    A group's grid reaches from its least to its largest weight.
    """

    VERSION: ClassVar[str] = "1"

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        del arch
        return ()

    def decide(self, model: ModelView) -> Decision:
        targets = self.targets(model.arch)
        grids = {tensor.name: partial(self._grid, model.checkpoint, tensor) for tensor in targets}
        return decision(self, tuple(self._edits(model, targets)), grids, {})

    def _edits(self, model: ModelView, targets: tuple[Tensor, ...]) -> Iterator[Overwrite]:
        for tensor in targets:
            yield Overwrite(tensor.name, partial(self._rounded, model.checkpoint, tensor))

    def _grid(self, checkpoint: Checkpoint, tensor: Tensor) -> Grid:
        matrix = as_matrix(tensor, checkpoint.read_finite(tensor.name))
        return nearest_grid(matrix, self.bits, self.group_size, symmetric=self.symmetric)

    def _rounded(self, checkpoint: Checkpoint, tensor: Tensor) -> torch.Tensor:
        stored = checkpoint.read_finite(tensor.name)
        matrix = as_matrix(tensor, stored)
        grid = nearest_grid(matrix, self.bits, self.group_size, symmetric=self.symmetric)
        values = grid.values(grid.codes(matrix))
        return as_matrix(tensor, values).contiguous().to(stored.dtype)
