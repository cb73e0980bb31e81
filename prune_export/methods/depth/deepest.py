"""Removes the deepest blocks except the last: the simple rule, which needs no data.

Without healing it is poor, as the state that reaches the last block is far from what it knows;
healed, it nearly ties with the angular distance.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import ModelView, Seam, Statistic
from prune_export.contracts import Decision
from prune_export.pruning.depth import block_choice, seam_refit


@dataclass(frozen=True)
class Deepest(block_choice.Amount):
    """Drop the n deepest blocks before the last one: L-n-1 to L-2, counted from 0.

    Source: Gromov et al., arXiv:2403.17887, section 4.4. Its formula, read literally, removes the
    last block and keeps the one before; its text says that the last is kept.
    """

    VERSION: ClassVar[str] = "2"

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return ()

    def decide(self, model: ModelView) -> Decision:
        return self.dropping(model, self._chosen(model.arch))

    def seams_known(self, arch: Arch) -> tuple[Seam, ...]:
        """The seam before the last block."""
        return seam_refit.seams_listed(arch, self._chosen(arch), "block")

    def _chosen(self, arch: Arch) -> Collection[int]:
        return self.layers or block_choice.deepest(arch.layers, self.of(arch))
