"""Removes the blocks whose removal, one at a time, raises perplexity least (Shortened LLaMA)."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Annotated, Any, ClassVar

from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView, SkipLoss, Statistic
from prune_export.contracts import Decision
from prune_export.pruning.depth import block_choice, protected_choice, selection


@dataclass(frozen=True)
class Perplexity(protected_choice.ProtectedAmount):
    """Drop the blocks that perplexity needs least, each skipped alone; the ends are protected.

    With `unit` it is the attention or the MLP of blocks that is skipped, and goes.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834, section 3.
    Differs: all variants are computed in one streamed pass; `contiguous` takes the run with the
    least sum of losses. The defaults are the paper's: 10 samples of 128 tokens (taken from the
    calibration data), the first four and the last two blocks protected.
    """

    VERSION: ClassVar[str] = "2"

    samples: Annotated[int, Field(ge=1, description="Calibration windows to score on.")] = 10
    length: Annotated[int, Field(ge=2, description="Tokens of each window to score on.")] = 128

    def _statistic(self, arch: Arch) -> SkipLoss:
        return SkipLoss(tuple(self.candidates(arch)), self.samples, self.length, self.unit)

    def statistics(self, arch: Arch) -> tuple[Statistic | ExtraPass, ...]:
        if self.layers is not None:
            return ()
        first = (self._statistic(arch),)
        if self.select == "one_shot":
            return first
        # What the first scoring takes is the statistic's own; the others are like it.
        half = len(self.candidates(arch)) / 2
        return (*first, *selection.passes(self.select, arch, self.of(arch), half))

    def _losses(self, model: ModelView) -> list[float]:
        """Measures the loss with each unit skipped; some may be gone from the model already."""
        every = tuple(range(model.arch.layers))
        statistic = SkipLoss(every, self.samples, self.length, self.unit)
        return list(model.gather([statistic])[statistic].skipped.values())

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        if (known := self.listed(model)) is not None:
            return known
        losses = model.stat(self._statistic(arch))
        candidates, remove = self.left(model, self.candidates(arch)), self.of(arch)
        if self.select == "iterative":
            choice = selection.iterative(model, remove, candidates, self._losses, self.unit)
        elif self.select == "greedy":
            own = [losses.skipped.get(i, losses.dense) - losses.dense for i in range(arch.layers)]
            choice = selection.guided(model, remove, candidates, own, self.unit)
        else:
            choice = block_choice.least_blocks(
                [losses.skipped[layer] for layer in candidates],
                remove,
                contiguous=self.contiguous,
                of=candidates,
            )
        scores: list[Any] = [None] * arch.layers
        for layer, loss in losses.skipped.items():
            scores[layer] = exp(loss)
        return self.removal(
            model,
            choice.dropped,
            **choice.log,
            dense_perplexity=exp(losses.dense),
            block_scores=scores,
            block_score_name=f"perplexity without the {self.unit}",
        )
