"""Removes the blocks that turn the residual states least, over all tokens (ShortGPT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import BlockInfluence, Further, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.methods import _depth, _search


@dataclass(frozen=True)
class BlockInfluenceDrop(_depth.Amount):
    """Drop the blocks with the least influence, wherever they are.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, eq. 1.
    Differs: `select` may choose one after another; of equal blocks the deepest goes first;
    `contiguous` takes the run with the least sum.
    """

    VERSION: ClassVar[str] = "1"

    contiguous: _depth.Contiguous = False
    select: _search.Select = "one_shot"

    def __post_init__(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            PlanError: a run is to be chosen block by block, or what `Amount` refuses.
        """
        super().__post_init__()
        _search.refuse_run(self.select, self.contiguous)

    def statistics(self, arch: Arch) -> tuple[Statistic | Further, ...]:
        if self.layers is not None:
            return ()
        if self.select == "one_shot":
            return (BlockInfluence(),)
        return _search.passes(self.select, arch, self.of(arch), 1.0)

    def decide(self, model: ModelView) -> Decision:
        if (known := _depth.listed(self, model.arch)) is not None:
            return known
        remove, every = self.of(model.arch), range(model.arch.layers)
        if self.select == "one_shot":
            influence = model.stat(BlockInfluence()).tolist()
            choice = _depth.least_blocks(influence, remove, contiguous=self.contiguous)
        else:
            influence = _influence(model)
            if self.select == "iterative":
                choice = _search.iterative(model, remove, every, _influence)
            else:
                choice = _search.guided(model, remove, every, influence)
        return _depth.decision(
            model.arch,
            choice.dropped,
            **choice.log,
            block_scores=influence,
            block_score_name="block influence, 1 - mean cosine",
        )


def _influence(model: ModelView) -> list[float]:
    found: list[float] = model.gather([BlockInfluence()])[BlockInfluence()].tolist()
    return found
