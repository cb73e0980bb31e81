"""Removes the run of adjacent blocks across which the residual stream turns least.

If a run hardly turns the stream, the block after it can do without it; what is lost is healed.
The map of all distances is kept, so that the report can draw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import AngularDistance, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.numeric.scores import runs
from prune_export.pruning.depth import block_choice, seam_refit


@dataclass(frozen=True)
class AngularDistanceDrop(block_choice.Amount):
    """Drop the run of blocks with the least angular distance across it.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887, section 3.2.
    Differs: distances are accurate where states are nearly parallel; the runner-up and the margin
    to it are logged; of equal runs the deepest is taken.
    """

    VERSION: ClassVar[str] = "2"

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return () if self.layers is not None else (AngularDistance(),)

    def seams_at_most(self, arch: Arch) -> str:
        """An upper bound on the number of seams, in words: one run is removed."""
        del arch
        return seam_refit.at_most(1)

    def decide(self, model: ModelView) -> Decision:
        if self.layers is not None:
            return self.dropping(model, self.layers)
        distances = model.stat(AngularDistance())
        remove = self.of(model.arch)
        of = model.arch.droppable
        scores = runs(distances, remove)[of.start : of.stop - remove + 1]
        choice = block_choice.least_run(scores, remove, of)
        return self.dropping(
            model,
            choice.dropped,
            **choice.log,
            distance_map=distances.tolist(),
            block_scores=runs(distances, 1),
            block_score_name="angular distance across the block, in units of pi",
        )
