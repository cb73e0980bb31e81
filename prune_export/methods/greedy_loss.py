"""Removes one block after another, each time the one without which the loss is measured lowest.

What is measured beats what is guessed from the states, most of all where many blocks go: blocks
that each seem idle may do the same work twice, and only one of them can then be missed. The cost is
forward passes through the blocks after a candidate; `_greedy.py` says how they are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Annotated, Any, ClassVar

from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import Further, ModelView, Unit
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.methods import _depth, _unit
from prune_export.methods._greedy import greedy


@dataclass(frozen=True)
class GreedyLoss(_depth.Amount):
    """Drop the blocks whose removal, one after the other, raises the measured loss least.

    After each removal the candidates are measured again, in the model without what is already gone.
    Only the `shortlist` with the least last known increase are; all on a quarter of the windows,
    the better half of them on two, the best of these on all. Blocks at the ends need no protection,
    as removing them is measured too. The log keeps each step's loss, increase and margin.

    Source: after Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and
    Elimination of Transformer Blocks", arXiv:2402.09025, algorithm 1.
    Differs: candidates race on growing parts of the data, and share the states before them; parts
    of blocks can go; a `beam` may follow several choices.
    """

    VERSION: ClassVar[str] = "1"

    unit: _unit.Of = "block"
    shortlist: Annotated[
        int | None,
        Field(ge=1, description="Candidates measured for each removal; null measures all."),
    ] = 8
    beam: Annotated[
        int,
        Field(
            ge=1, description="Choices followed at once; the cost is a multiple, the gain small."
        ),
    ] = 1
    protect_first: Annotated[int, Field(ge=0, description="First blocks never removed.")] = 0
    protect_last: Annotated[int, Field(ge=0, description="Last blocks never removed.")] = 0
    samples: Annotated[int, Field(ge=1, description="Calibration windows to measure on.")] = 8
    length: Annotated[int, Field(ge=2, description="Tokens of each window to measure on.")] = 256

    def statistics(self, arch: Arch) -> tuple[Further, ...]:
        if self.layers is not None:
            return ()
        forwards, head = self._passes(arch)
        residual = arch.sizes["residual"]
        states = self.samples * self.length * residual * 4
        return (
            Further(
                forwards=forwards + head,
                samples=self.samples,
                length=self.length,
                ram_bytes=2 * arch.sizes["vocab"] * residual * 4 + 4 * states,
                handy_bytes=4 * arch.parameters() + 2 * arch.layers * states,
            ),
        )

    def predict(self, arch: Arch) -> Arch:
        if self.layers is None:
            self._candidates(arch)
        elif self.unit != "block":
            arch.kept(self.layers)
        self.of(arch)
        return super().predict(arch) if self.unit == "block" else arch

    def decide(self, model: ModelView) -> Decision:
        arch, checkpoint = model.arch, model.checkpoint
        if self.layers is not None:
            listed = [Unit(layer, self.unit) for layer in self.layers]
            return _unit.decision(arch, checkpoint, listed)
        units = [Unit(layer, self.unit) for layer in self._candidates(arch)]
        shortlist = self.shortlist or len(units)
        with model.removals(self.samples, self.length) as removals:
            found = greedy(removals, units, self.of(arch), shortlist=shortlist, beam=self.beam)
            passes = {
                "block_forwards": removals.block_forwards,
                "head_forwards": removals.head_forwards,
                "chunks": removals.chunks,
            }
        scores: list[Any] = [None] * arch.layers
        for unit, cost in found.first_costs.items():
            scores[unit.layer] = cost
        return _unit.decision(
            arch,
            checkpoint,
            found.order,
            order=[unit.layer for unit in found.order],
            steps=[dict(step) for step in found.steps],
            dense_perplexity=exp(found.dense_loss),
            perplexity=exp(found.loss),
            block_scores=scores,
            block_score_name=f"increase of the loss (nats) without the {self.unit}",
            passes=passes,
        )

    def _candidates(self, arch: Arch) -> range:
        candidates = range(self.protect_first, arch.layers - self.protect_last)
        remove = self.of(arch)
        if remove > len(candidates):
            raise PlanError(
                "protect_first, protect_last",
                f"leave {len(candidates)} of {arch.layers} blocks to choose from, "
                f"expected at least {remove}",
                "lower them, or remove fewer blocks",
            )
        return candidates

    def _passes(self, arch: Arch) -> tuple[float, float]:
        """Forward passes of all windows through the blocks, and through the head in such passes."""
        layers, remove = arch.layers, self.of(arch)
        racers = len(self._candidates(arch)) + (remove - 1) * (self.shortlist or layers) * self.beam
        # A racer sees a half of the chunks on average, and half of the blocks come after it.
        candidates = racers / 2
        blocks = arch.parameters() - 2 * arch.sizes["vocab"] * arch.sizes["residual"]
        head = arch.sizes["vocab"] * arch.sizes["residual"] / max(blocks, 1)
        return candidates / 2 + 1, candidates * head
