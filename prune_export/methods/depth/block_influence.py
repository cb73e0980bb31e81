"""Removes the blocks that turn the residual stream least, over all tokens (ShortGPT).

With `unit: attention` it is the Attention Drop of He et al., with `unit: mlp` their MLP Drop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import BlockInfluence, ExtraPass, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.pruning.depth import block_choice, part_choice, selection


@dataclass(frozen=True)
class BlockInfluenceDrop(part_choice.Amount):
    """Drop the blocks with the least block influence, or their attention or MLP alone.

    Source: Men et al., "ShortGPT", arXiv:2403.03853, eq. 1; for a part of a block: He et al.,
    "What Matters in Transformers? Not All Attention is Needed", arXiv:2406.15786.
    Differs: `select` may choose one after another; of equal blocks the deepest goes first;
    `contiguous` takes the run with the least sum. A part's influence is that of adding its output
    to the residual states; where the block adds both parts to what enters it, each is alone.
    """

    VERSION: ClassVar[str] = "2"

    contiguous: block_choice.Contiguous = False
    select: selection.Select = "one_shot"

    def __post_init__(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            PlanError: a run is to be chosen block by block, or what `Amount` refuses.
        """
        super().__post_init__()
        selection.refuse_run(self.select, self.contiguous)

    def statistics(self, arch: Arch) -> tuple[Statistic | ExtraPass, ...]:
        if self.layers is not None:
            return ()
        if self.select == "one_shot":
            return (self._statistic(),)
        return selection.passes(self.select, arch, self.of(arch), 1.0)

    def decide(self, model: ModelView) -> Decision:
        if (known := self.listed(model)) is not None:
            return known
        remove, left = self.of(model.arch), self.left(model, self.candidates(model.arch))
        if self.select == "one_shot":
            influence = model.stat(self._statistic()).tolist()
            own = [influence[layer] for layer in left]
            choice = block_choice.least_blocks(own, remove, contiguous=self.contiguous, of=left)
        else:
            influence = self._influence(model)
            if self.select == "iterative":
                choice = selection.iterative(model, remove, left, self._influence, self.unit)
            else:
                choice = selection.guided(model, remove, left, influence, self.unit)
        return self.removal(
            model,
            choice.dropped,
            **choice.log,
            block_scores=influence,
            block_score_name=f"{self.unit} influence, 1 - mean cosine",
        )

    def _statistic(self) -> BlockInfluence:
        return BlockInfluence(part=self.unit)

    def _influence(self, model: ModelView) -> list[float]:
        asked = self._statistic()
        found: list[float] = model.gather([asked])[asked].tolist()
        return found
