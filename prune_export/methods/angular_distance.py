"""Removes the run of neighbouring blocks across which the residual state turns least.

If a run hardly turns the state, the block after it can do without it; what is lost is healed.
The map of all distances is kept, so that the report can draw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import AngularDistance, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.methods import _depth
from prune_export.scores import runs


@dataclass(frozen=True)
class AngularDistanceDrop:
    """Drop the run of blocks with the least angular distance across it.

    Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers",
    arXiv:2403.17887, section 3.2.
    Differs: distances are accurate where states are nearly parallel; the runner-up and the margin
    to it are logged; of equal runs the deepest is taken.
    """

    VERSION: ClassVar[str] = "1"

    sparsity: _depth.Sparsity = None
    remove: _depth.Remove = None
    layers: _depth.Layers = None

    def __post_init__(self) -> None:
        self._amount()

    def _amount(self) -> _depth.Amount:
        return _depth.Amount(self.sparsity, self.remove, self.layers)

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return () if self.layers is not None else (AngularDistance(),)

    def predict(self, arch: Arch) -> Arch:
        return self._amount().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        amount = self._amount()
        if (known := _depth.listed(amount, model.arch)) is not None:
            return known
        distances = model.stat(AngularDistance())
        remove = amount.of(model.arch)
        choice = _depth.least_run(runs(distances, remove), remove)
        return _depth.decision(
            model.arch,
            choice.dropped,
            **choice.log,
            distance_map=distances.tolist(),
            block_scores=runs(distances, 1),
            block_score_name="angular distance across the block, in units of pi",
        )
