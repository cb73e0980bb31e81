"""Removes the deepest blocks except the last: the simple rule, which needs no data.

Without healing it is poor, as the state that reaches the last block is far from what it knows;
healed, it nearly ties with the angular distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.methods import _depth


@dataclass(frozen=True)
class Deepest(_depth.Amount):
    """Drop the n deepest blocks before the last one: L-n-1 to L-2, counted from 0.

    Source: Gromov et al., arXiv:2403.17887, section 4.4. Its formula, read literally, removes the
    last block and keeps the one before; its text says that the last is kept.
    """

    VERSION: ClassVar[str] = "1"

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return ()

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        chosen = self.layers or _depth.deepest(arch.layers, self.of(arch))
        return _depth.decision(arch, chosen)
