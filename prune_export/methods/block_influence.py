"""Removes the blocks that turn the residual states least, over all tokens (ShortGPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import BlockInfluence, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.methods import _depth


@dataclass(frozen=True)
class BlockInfluenceDrop:
    """Drop the blocks with the least influence, wherever they are, in one shot.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, eq. 1.
    Differs: of equal blocks the deepest goes first; `contiguous` takes the run with the least sum.
    """

    VERSION: ClassVar[str] = "1"

    sparsity: _depth.Sparsity = None
    remove: _depth.Remove = None
    layers: _depth.Layers = None
    contiguous: _depth.Contiguous = False

    def __post_init__(self) -> None:
        self._amount()

    def _amount(self) -> _depth.Amount:
        return _depth.Amount(self.sparsity, self.remove, self.layers)

    def statistics(self, arch: Arch) -> tuple[Statistic, ...]:
        del arch
        return () if self.layers is not None else (BlockInfluence(),)

    def predict(self, arch: Arch) -> Arch:
        return self._amount().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        amount = self._amount()
        if (known := _depth.listed(amount, model.arch)) is not None:
            return known
        influence = model.stat(BlockInfluence()).tolist()
        choice = _depth.least_blocks(influence, amount.of(model.arch), contiguous=self.contiguous)
        return _depth.decision(
            model.arch,
            choice.dropped,
            **choice.log,
            block_scores=influence,
            block_score_name="block influence, 1 - mean cosine",
        )
