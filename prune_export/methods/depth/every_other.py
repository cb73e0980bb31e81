"""Removes evenly spaced blocks, without scoring them: for models trained with LayerDrop.

A model that was trained with blocks missing at random can do without any evenly spread part of
them. One that was not can't: use a method that measures. `heal` offers `layerdrop`, which trains an
adapter in that way, but a short fine-tuning does not make an existing model robust.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from prune_export.arch import Arch
from prune_export.calibrate import ModelView, Seam
from prune_export.contracts import Decision
from prune_export.pruning.depth import block_choice, seam_refit

_WARNING: Final = "meant for models trained with LayerDrop; others lose much"


@dataclass(frozen=True)
class EveryOther(block_choice.Amount):
    """Drop evenly spaced blocks: for half of them, every other one; needs no data.

    Only models trained with LayerDrop bear it. The first block is kept unless more than half go.

    Source: Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout",
    arXiv:1909.11556, section 3.2 ("Every Other").
    Differs: any number of blocks can go: the i-th of n is number floor(i L / n), counted from 1,
    where the paper takes the multiples of a whole number.
    """

    VERSION: ClassVar[str] = "2"

    def statistics(self, arch: Arch) -> tuple[()]:
        del arch
        return ()

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut."""
        return arch.without(self._chosen(arch))

    def note(self, arch: Arch) -> str:
        """Warns in the plan that most models do not bear it."""
        del arch
        return _WARNING

    def decide(self, model: ModelView) -> Decision:
        return self.dropping(model, self._chosen(model.arch), warning=_WARNING)

    def seams_known(self, arch: Arch) -> tuple[Seam, ...]:
        """The seams of evenly spaced blocks."""
        return seam_refit.seams_listed(arch, self._chosen(arch), "block")

    def _chosen(self, arch: Arch) -> tuple[int, ...]:
        count = self.of(arch)
        if self.layers is not None:
            return self.layers
        return tuple((i + 1) * arch.layers // count - 1 for i in range(count))
