"""Removes blocks one by one, each time the one without which the measured loss is lowest (SLEB).

Measuring beats scores of hidden states, most of all where many blocks go: of two blocks that each
seem redundant, both may do the same work, and only one of them can go. The cost is forward passes
through the blocks after a candidate; `pruning/depth/greedy.py` says how they are saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView, Unit, native_dtype
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.depth import part_choice
from prune_export.pruning.depth.greedy import greedy


@dataclass(frozen=True)
class GreedyLoss(part_choice.Amount):
    """Drop the blocks whose removal, one after the other, raises the measured loss least.

    After each removal the candidates are measured again, in the model without what is already gone.
    Only the `shortlist` with the least last known increase are: all on a quarter of the windows,
    the better half on two, the best of these on all. Then earlier removals are revised. Blocks at
    the ends need no protection, as removing them is measured too. The log has each step's loss,
    increase and margin, and the best model of each size.

    Source: Song et al., "SLEB: Streamlining LLMs through Redundancy Verification and Elimination
    of Transformer Blocks", arXiv:2402.09025, algorithm 1.
    Differs: candidates race on growing parts of the data and share the states before them; earlier
    removals are revised, or a `beam` followed; parts of blocks can go.
    """

    VERSION: ClassVar[str] = "2"

    shortlist: Annotated[
        int | None,
        Field(ge=1, description="Candidates measured for each removal; null measures all."),
    ] = 8
    beam: Annotated[
        int, Field(ge=1, description="Choices followed at once, instead of revising a single one.")
    ] = 1
    revise: Annotated[
        bool,
        Field(description="Put earlier ones back where that is better, and go on from there."),
    ] = True
    protect_first: Annotated[int, Field(ge=0, description="First blocks never removed.")] = 0
    protect_last: Annotated[int, Field(ge=0, description="Last blocks never removed.")] = 0
    samples: Annotated[int, Field(ge=1, description="Calibration windows to measure on.")] = 8
    length: Annotated[int, Field(ge=2, description="Tokens of each window to measure on.")] = 256
    compute_dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(
            description="What losses are computed in. `auto` is bfloat16 where the hardware has it "
            "(CUDA, or a CPU with AMX or AVX512-BF16), which errs by some 0.001 nats, else float32."
        ),
    ] = "auto"

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        if self.layers is not None:
            return ()
        forwards, head = self._passes(arch)
        residual = arch.sizes["residual"]
        states = self.samples * self.length * residual * 4
        return (
            ExtraPass(
                forwards=forwards + head,
                samples=self.samples,
                length=self.length,
                ram_bytes=2 * arch.sizes["vocab"] * residual * 4 + 4 * states,
                handy_bytes=4 * arch.parameters() + 2 * arch.layers * states,
            ),
        )

    def predict(self, arch: Arch) -> Arch:
        if self.layers is None:
            self.candidates(arch)
        return super().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        if (known := self.listed(model)) is not None:
            return known
        units = [Unit(layer, self.unit) for layer in self.left(model, self.candidates(arch))]
        dtype = native_dtype(model.calibration().machine)
        if self.compute_dtype != "auto":
            dtype = getattr(torch, self.compute_dtype)
        with model.ablations(self.samples, self.length, dtype) as ablations:
            found = greedy(
                ablations,
                units,
                self.of(arch),
                shortlist=self.shortlist or len(units),
                beam=self.beam,
                revise=self.revise,
            )
            passes = {
                "block_forwards": ablations.block_forwards,
                "head_forwards": ablations.head_forwards,
                "chunks": ablations.chunks,
                "compute_dtype": str(dtype).removeprefix("torch."),
            }
        scores: list[Any] = [None] * arch.layers
        for unit, cost in found.first_costs.items():
            scores[unit.layer] = cost
        return self.removal(
            model,
            [unit.layer for unit in found.order],
            order=[unit.layer for unit in found.order],
            steps=[dict(step) for step in found.steps],
            best=[[exp(loss), sorted(unit.layer for unit in gone)] for loss, gone in found.best],
            dense_perplexity=exp(found.best[0][0]),
            perplexity=exp(found.best[-1][0]),
            block_scores=scores,
            block_score_name=f"increase of the loss (nats) without the {self.unit}",
            passes=passes,
        )

    def candidates(self, arch: Arch) -> range:
        possible = self.possible(arch)
        first, last = self.protect_first, arch.layers - self.protect_last
        candidates = range(max(first, possible.start), min(last, possible.stop))
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
        """Estimates the forward passes of all windows through the blocks and through the head."""
        layers, remove = arch.layers, self.of(arch)
        racers = len(self.candidates(arch)) + (remove - 1) * (self.shortlist or layers) * self.beam
        # A racer sees half of the chunks on average, and half of the blocks come after it.
        candidates = racers * (1.0 if self.revise and self.beam == 1 else 0.5)
        head = candidates * arch.head_parameters() / arch.block_parameters()
        return candidates / 2 + 1, head
