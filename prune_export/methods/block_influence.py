"""Removes the blocks that turn the residual states least, over all tokens (ShortGPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import BlockInfluence, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.methods import _depth


@dataclass(frozen=True)
class BlockInfluenceDrop(_depth.Amount):
    """Drop the blocks with the least influence, wherever they are, in one shot.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, eq. 1.
    Differs: of equal blocks the deepest goes first; `contiguous` takes the run with the least sum.
    """

    VERSION: ClassVar[str] = "1"

    contiguous: _depth.Contiguous = False

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return () if self.layers is not None else (BlockInfluence(),)

    def decide(self, model: ModelView) -> Decision:
        if (known := _depth.listed(self, model.arch)) is not None:
            return known
        influence = model.stat(BlockInfluence()).tolist()
        choice = _depth.least_blocks(influence, self.of(model.arch), contiguous=self.contiguous)
        return _depth.decision(
            model.arch,
            choice.dropped,
            **choice.log,
            block_scores=influence,
            block_score_name="block influence, 1 - mean cosine",
        )
