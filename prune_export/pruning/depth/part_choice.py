"""Removes whole blocks, or zeroes the output of their attention or MLP.

A block's attention or MLP alone can't be left out of a stock transformers model, but the matrix
that writes its output can be zero: it then adds nothing to the residual state, also where a norm
follows it, and also beside a parallel branch. Exporters leave out what multiplies by zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from prune_export.ablated import Ablated
from prune_export.arch import Arch
from prune_export.calibrate import OUTPUTS, ModelView, Seam, Unit
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.contracts import Decision
from prune_export.errors import PlanError, StageError
from prune_export.pruning.depth import block_choice, seam_refit
from prune_export.surgery import Overwrite

Of = Annotated[
    Literal["block", "attention", "mlp"],
    Field(
        description="What is removed: whole `block`s, or of a block its `attention` or its `mlp` "
        "alone. Those stay in the files as zeros, so that any transformers loads them; exported "
        "engines leave them out."
    ),
]


@dataclass(frozen=True)
class Amount(block_choice.Amount):
    """How many blocks, attentions or MLPs to remove; keys of the methods that can do all three."""

    unit: Of = "block"

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; an attention or MLP that goes keeps its shape, as zeros.

        Raises:
            PlanError: some blocks have no such part, or it cannot go from so many.
        """
        if self.unit == "block":
            return super().predict(arch)
        self._refuse_half_blocks(arch)
        if self.layers is not None:
            arch.kept(self.layers)
        self.of(arch)
        return arch

    def _refuse_half_blocks(self, arch: Arch) -> None:
        outputs = OUTPUTS[self.unit]
        for layer in range(arch.layers):
            if not any(tensor.role in outputs for tensor in arch.block(layer)):
                raise PlanError(
                    f"unit: {self.unit}",
                    f"block {layer} has none: blocks of {arch.family} are one part alone",
                    "write `unit: block`: each block that goes is such a part",
                )

    def ablated(self, arch: Arch, known: Ablated) -> Ablated:
        """The parts of blocks that are zeroed after it.

        Raises:
            PlanError: after earlier stages there cannot be as many left as are to be removed.
        """
        if self.unit == "block":
            return super().ablated(arch, known)
        places = known.of(self.unit)
        if self.layers is not None:
            return known.replaced(self.unit, places.listed(self.layers))
        allowed, remove = self.candidates(arch), self.of(arch)
        gone = places.least_in(allowed)
        if len(allowed) - gone < remove:
            raise PlanError(
                f"unit: {self.unit}",
                f"{remove} are to be removed, and at most {len(allowed) - gone} are left to choose "
                f"from: of {gone} blocks it is zero after earlier stages",
                "remove fewer, or remove whole blocks",
            )
        return known.replaced(self.unit, places.chosen(remove, allowed))

    def candidates(self, arch: Arch) -> range:
        """The blocks to choose from, without protected ones."""
        return self.possible(arch)

    def possible(self, arch: Arch) -> range:
        """The blocks that the model can do without, or whose part it can do without."""
        return arch.droppable if self.unit == "block" else range(arch.layers)

    def note(self, arch: Arch) -> str:
        """Says in the plan how a removed part of a block is stored."""
        if self.unit == "block":
            return ""
        return f"{self.of(arch)} x {self.unit} stored as zeros, left out of engines"

    def left(self, model: ModelView, layers: Sequence[int]) -> Sequence[int]:
        """Those of `layers` whose part is not zero yet: earlier stages may have ablated some.

        Raises:
            StageError: there are fewer than are to be removed.
        """
        if self.unit == "block":
            return layers
        found = tuple(layer for layer in layers if not self._silent(model, layer))
        if len(found) < self.of(model.arch):
            raise StageError(
                f"unit: {self.unit}",
                f"{self.of(model.arch)} are to be removed, and {len(found)} are left to choose "
                f"from: of {len(layers) - len(found)} blocks it is zero already",
                "remove fewer, or remove whole blocks",
            )
        return found

    def _silent(self, model: ModelView, layer: int) -> bool:
        outputs = [
            tensor for tensor in model.arch.block(layer) if tensor.role in OUTPUTS[self.unit]
        ]
        return not any(bool(model.checkpoint.read_finite(one.name).any()) for one in outputs)

    def removal(self, model: ModelView, layers: Iterable[int], **log: Any) -> Decision:
        """Makes the edits that remove these blocks, or this part of each; the log names them."""
        units = [Unit(layer, self.unit) for layer in layers]
        return self.refitted(model, decision(model.arch, model.checkpoint, units, **log), units)

    def seams_known(self, arch: Arch) -> tuple[Seam, ...] | None:
        """The seams, where the recipe lists the blocks; None where it does not."""
        return (
            None if self.layers is None else seam_refit.seams_listed(arch, self.layers, self.unit)
        )

    def seams_at_most(self, arch: Arch) -> str:
        """An upper bound on the number of seams, in words."""
        return seam_refit.at_most(1 if getattr(self, "contiguous", False) else self.of(arch))

    def listed(self, model: ModelView) -> Decision | None:
        """The decision, where the recipe lists the blocks; None where they must be found."""
        return None if self.layers is None else self.removal(model, self.layers)


def decision(arch: Arch, checkpoint: Checkpoint, units: Collection[Unit], **log: Any) -> Decision:
    """Makes the edits that remove these units, all of one kind; the log names them."""
    blocks = [unit.layer for unit in units if unit.part == "block"]
    if blocks:
        return block_choice.decision(arch, blocks, **log)
    zeroed = [[unit.layer, unit.part] for unit in sorted(units)]
    edits = tuple(edit for unit in sorted(units) for edit in _silencing(arch, checkpoint, unit))
    return Decision(edits, {"zeroed": zeroed, "kept": list(range(arch.layers)), **log})


def _silencing(arch: Arch, checkpoint: Checkpoint, unit: Unit) -> Iterator[Overwrite]:
    for tensor in arch.block(unit.layer):
        if tensor.role in OUTPUTS[unit.part]:
            dtype = getattr(torch, TORCH[checkpoint.entries[tensor.name].dtype])
            yield Overwrite(tensor.name, partial(torch.zeros, arch.shape(tensor), dtype=dtype))
