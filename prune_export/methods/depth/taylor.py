"""Removes the blocks whose weights the loss depends on least, by first-order Taylor expansion.

The gradients are streamed backward, one block in memory, so the score costs one forward and one
backward pass, in which each block is computed again, and no second model. Blocks that are protected
have no score: the backward pass ends above the first ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch

from prune_export.arch import Arch
from prune_export.arch.roles import role
from prune_export.calibrate import ExtraPass, ModelView, Part, Sums, block_bytes
from prune_export.contracts import Decision
from prune_export.pruning.depth import block_choice, protected_choice, selection


@dataclass(frozen=True)
class Taylor(protected_choice.ProtectedAmount):
    """Drop the blocks with the least sum of |weight x gradient|, the ends being protected.

    With `unit` it is the attention or the MLP of blocks whose own weights are summed, and that
    goes. The norms around it do not count: some serve both, or stay.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834, section 3 ("Taylor+"); the signed
    gradients of all windows are summed before the absolute value, as in its released code.
    Differs: gradients are in float32 and exact; all calibration windows are used, not ten.
    """

    VERSION: ClassVar[str] = "2"

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        if self.layers is not None:
            return ()
        ram = 2 * block_bytes(arch, torch.float32)
        forwards = 1 + 3 * (arch.layers - self.protect_first) / arch.layers
        if self.select == "one_shot":
            return (ExtraPass(forwards=forwards, ram_bytes=ram),)
        return selection.passes(self.select, arch, self.of(arch), forwards, ram_bytes=ram)

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        if (known := self.listed(model)) is not None:
            return known
        candidates, remove = self.left(model, self.candidates(arch)), self.of(arch)
        scores = self._changes(model)
        if self.select == "iterative":
            choice = selection.iterative(model, remove, candidates, self._changes, self.unit)
        elif self.select == "greedy":
            choice = selection.guided(model, remove, candidates, scores, self.unit)
        else:
            choice = block_choice.least_blocks(
                [scores[layer] for layer in candidates],
                remove,
                contiguous=self.contiguous,
                of=candidates,
            )
        return self.removal(
            model,
            choice.dropped,
            **choice.log,
            block_scores=[score if score < inf else None for score in scores],
            block_score_name=f"sum of |weight x gradient| of the {self.unit}",
        )

    def _changes(self, model: ModelView) -> list[float]:
        """Scores every block of a model, from which some may be gone; infinite at the ends."""
        layers = model.arch.layers
        allowed = range(self.protect_first, layers - self.protect_last)
        found = model.gradients(_Changes(self.unit, model.arch, allowed))
        return [
            float(found.block(layer)["change"]) if layer in allowed else inf
            for layer in range(layers)
        ]


def _part(name: str | None) -> Part | None:
    """The part (attention, MLP) whose weight a parameter of a role is; None of neither."""
    # Experts and their router have no role here: their names in memory are not those on the disk.
    return "mlp" if name is None else role(name).part


@dataclass(frozen=True)
class _Changes:
    """Reduces a block's gradients to a sum of |weight x gradient|, over all or a part's weights."""

    part: Part
    arch: Arch
    layers: range
    kinds: ClassVar[tuple[Any, ...]] = ("sum",)

    @property
    def key(self) -> str:
        return f"taylor-2 {self.part} {self.layers}"

    def wants(self, layer: int, name: str) -> bool:
        if layer not in self.layers:
            return False
        return self.part == "block" or _part(self._roles(layer).get(name)) == self.part

    def _roles(self, layer: int) -> dict[str, str]:
        prefix = f"{self.arch.table.on_disk}.{layer}."
        return {tensor.name.removeprefix(prefix): tensor.role for tensor in self.arch.block(layer)}

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        del layer
        change = torch.zeros((), dtype=torch.float64)
        for name, own in sums.items():
            change += float((parameters[name].float() * own["sum"]).abs().sum(dtype=torch.float64))
        return {"change": change}
