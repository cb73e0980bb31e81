"""Merges runs of layers into their first one where the final hidden states hardly change (LaCo).

The paper adds the differences of the merged layers to the first one. Its released code, in place,
ends up with the last layer's matrices under the first one's norms; here both can be had, and plain
dropping to compare with. What the paper lacks, an exact number of layers, is found in three ways.
`docs/laco.md` says how all of these do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.ablated import Ablated
from prune_export.arch import Arch
from prune_export.calibrate import (
    ExtraPass,
    MergeSimilarity,
    ModelView,
    Unit,
    block_bytes,
)
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.depth import block_choice, collapse, seam_refit
from prune_export.surgery import Drop, Edit, Overwrite


@dataclass(frozen=True)
class Laco(block_choice.Amount):
    """Merge runs of adjacent layers into one layer each, measured on the last hidden states.

    With `sparsity` or `remove`, exactly so many layers go, found as `target` says. With neither, it
    is the paper's algorithm 1: from the top down, a run is merged where the states stay more
    similar to the dense model's than `threshold`, and how many go is left to it. Norms are never
    merged; biases go with their matrices.

    Source: Yang, Cao and Zhao, "LaCo: Large Language Model Pruning via Layer Collapse",
    arXiv:2402.11187, algorithm 1; defaults as for Llama-2-7B.
    Differs: `merge: last`, the default, is what the released code computes, not the paper's sum;
    samples are calibration windows instead of ten sentences.
    """

    VERSION: ClassVar[str] = "2"

    merge: Annotated[
        Literal["rdsc", "last", "drop"],
        Field(
            description="What a folded layer is: `rdsc`, the paper's sum of differences; `last`, "
            "the last layer's matrices under the first one's norms (the released code); `drop`, "
            "the first layer alone."
        ),
    ] = "last"
    target: Annotated[
        Literal["segments", "budget", "bisection"],
        Field(
            description="How an exact number is met: `segments` measures all runs and combines the "
            "best; `budget` runs algorithm 1, lowering `threshold` while too few layers went; "
            "`bisection` searches the highest threshold that suffices."
        ),
    ] = "segments"
    merge_layers: Annotated[
        int, Field(ge=2, description="Layers of a run at most, the one they merge into included.")
    ] = 4
    interval: Annotated[
        int, Field(ge=1, description="Layers that algorithm 1 goes down after a merge.")
    ] = 2
    threshold: Annotated[
        float, Field(gt=-1, lt=1, description="The cosine above which algorithm 1 merges.")
    ] = 0.65
    lowest: Annotated[int, Field(ge=0, description="The first layer that may change.")] = 1
    highest: Annotated[
        int | None,
        Field(ge=1, description="The layer before which merging ends; null: the number of layers."),
    ] = None
    samples: Annotated[int, Field(ge=1, description="Calibration windows to compare on.")] = 10
    length: Annotated[int, Field(ge=2, description="Tokens of each window.")] = 64

    def ablated(self, arch: Arch, known: Ablated) -> Ablated:
        """No part is known to be zero: a merged layer has matrices of several."""
        del arch, known
        return Ablated()

    def __post_init__(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            PlanError: blocks are listed, or the amount is said twice.
        """
        if self.layers is not None:
            raise PlanError(
                "layers", "lists blocks to remove, but laco folds runs", "write `remove`"
            )
        if self.sparsity is not None or self.remove is not None:
            super().__post_init__()

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        trials = arch.layers * (self.merge_layers - 1)
        return (
            ExtraPass(
                forwards=trials / 2 + 1,
                samples=self.samples,
                length=self.length,
                ram_bytes=block_bytes(arch, torch.float32),
                handy_bytes=4 * arch.parameters(),
            ),
        )

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; where the threshold decides, as if a quarter were merged.

        Raises:
            PlanError: blocks differ in shape, or so many cannot be merged in this range.
        """
        highest = self._highest(arch)
        shapes = [
            sorted((tensor.role, arch.shape(tensor)) for tensor in arch.block(layer))
            for layer in range(self.lowest, highest)
        ]
        if self.merge != "drop" and any(own != shapes[0] for own in shapes):
            raise PlanError(
                "merge", "blocks of this model differ in shape and cannot be merged", "write `drop`"
            )
        if not self._exact:
            return arch.without(block_choice.deepest(arch.layers, max(1, arch.layers // 4)))
        count = self.of(arch)
        most = collapse.most(self.lowest, highest, self.merge_layers, self.target)
        if count > most:
            raise PlanError(
                "how many layers",
                f"{count} cannot be folded between layers {self.lowest} and {highest} in runs of "
                f"{self.merge_layers}, at most {most}",
                "raise `merge_layers`, lower `lowest`, or remove fewer",
            )
        return super().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        arch, context = model.arch, model.calibration()
        context = context.of_first(self.samples, self.length)
        with MergeSimilarity(model.checkpoint, context, arch=arch) as measured:
            search = collapse.FoldSearch(
                measured,
                self.merge,
                self.merge_layers,
                self.interval,
                self.lowest,
                self._highest(arch),
            )
            found = self._found(search, arch)
            similarity = measured.similarity(found.chain)
            forwards = measured.block_forwards
        kept = {layer.of for layer in found.chain}
        dropped = [layer for layer in range(arch.layers) if layer not in kept]
        edits: list[Edit] = [Drop(tuple(dropped))] if dropped else []
        for layer in found.chain:
            for tensor in arch.block(layer.of) if not layer.is_plain else ():
                if not tensor.role.startswith("norm"):
                    value = partial(layer.tensor, model.checkpoint, arch, tensor.name)
                    edits.append(Overwrite(tensor.name, value))
        log: dict[str, Any] = {
            "dropped": dropped,
            "kept": sorted(kept),
            "merge": self.merge,
            "folds": [[fold.of, fold.layers, fold.similarity] for fold in found.folds],
            "folded": {
                str(layer.of): [list(part) for part in layer.weights]
                for layer in found.chain
                if not layer.is_plain
            },
            "similarity": similarity,
            "threshold": found.threshold,
            "passes": {"block_forwards": forwards},
        }
        return self.refitted(model, Decision(tuple(edits), log), [Unit(one) for one in dropped])

    def seams_at_most(self, arch: Arch) -> str:
        """An upper bound on the number of seams, in words."""
        return seam_refit.at_most(self.of(arch)) if self._exact else "each seam"

    @property
    def _exact(self) -> bool:
        return self.sparsity is not None or self.remove is not None

    def _highest(self, arch: Arch) -> int:
        return min(self.highest or arch.layers, arch.layers)

    def _found(self, search: collapse.FoldSearch, arch: Arch) -> collapse.Collapsed:
        if not self._exact:
            return search.sweep(self.threshold)
        count = self.of(arch)
        match self.target:
            case "segments":
                return search.segments(count)
            case "budget":
                return search.budget(self.threshold, count)
            case "bisection":
                return search.bisection(count)
