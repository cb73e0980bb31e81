"""Removes the blocks whose weights the loss depends on least, by its first-order change.

The gradients are streamed backward, one block in memory, so the score costs one forward and one
backward pass and no second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import Further, ModelView, Sums, block_bytes
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.methods import _depth, _search


@dataclass(frozen=True)
class Taylor(_depth.Amount):
    """Drop the blocks with the least sum of |weight x gradient|, the ends being protected.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834, section 3 ("Taylor+"); the signed
    gradients of all windows are summed before the absolute value, as in its released code.
    Differs: gradients are in float32 and exact; all calibration windows are used, not ten.
    """

    VERSION: ClassVar[str] = "1"

    contiguous: _depth.Contiguous = False
    protect_first: Annotated[
        int, Field(ge=0, description="First blocks never removed: their gradients mislead.")
    ] = 4
    protect_last: Annotated[int, Field(ge=0, description="Last blocks never removed.")] = 2
    select: _search.Select = "one_shot"

    def __post_init__(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            PlanError: a run is to be chosen block by block, or what `Amount` refuses.
        """
        super().__post_init__()
        _search.refuse_run(self.select, self.contiguous)

    def _candidates(self, arch: Arch) -> range:
        candidates = range(self.protect_first, arch.layers - self.protect_last)
        remove = self.of(arch)
        if remove > len(candidates):
            raise PlanError(
                "protect_first, protect_last",
                f"leave {len(candidates)} of {arch.layers} blocks to choose from, "
                f"expected at least {remove}",
                "lower them, for example `protect_first: 1` and `protect_last: 1`, "
                "or remove fewer blocks",
            )
        return candidates

    def statistics(self, arch: Arch) -> tuple[Further, ...]:
        if self.layers is not None:
            return ()
        ram = 2 * block_bytes(arch, torch.float32)
        if self.select == "one_shot":
            return (Further(forwards=4, ram_bytes=ram),)
        return _search.passes(self.select, arch, self.of(arch), 4, ram_bytes=ram)

    def predict(self, arch: Arch) -> Arch:
        if self.layers is None:
            self._candidates(arch)
        return super().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        if (known := _depth.listed(self, arch)) is not None:
            return known
        candidates, remove = self._candidates(arch), self.of(arch)
        scores = _changes(model)
        if self.select == "iterative":
            choice = _search.iterative(model, remove, candidates, _changes)
        elif self.select == "greedy":
            choice = _search.guided(model, remove, candidates, scores)
        else:
            choice = _depth.least_blocks(
                [scores[layer] for layer in candidates],
                remove,
                contiguous=self.contiguous,
                first=self.protect_first,
            )
        return _depth.decision(
            arch,
            choice.dropped,
            **choice.log,
            block_scores=scores,
            block_score_name="sum of |weight x gradient|",
        )


def _changes(model: ModelView) -> list[float]:
    found = model.gradients(_Changes())
    return [float(found.block(layer)["change"]) for layer in range(model.arch.layers)]


@dataclass(frozen=True)
class _Changes:
    """Keeps one number of a block: the sum of |weight x gradient| over all of its weights."""

    kinds: ClassVar[tuple[Any, ...]] = ("sum",)
    key: ClassVar[str] = "taylor-1"

    def wants(self, layer: int, name: str) -> bool:
        del layer, name
        return True

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        del layer
        change = torch.zeros((), dtype=torch.float64)
        for name, own in sums.items():
            change += float((parameters[name].float() * own["sum"]).abs().sum(dtype=torch.float64))
        return {"change": change}
