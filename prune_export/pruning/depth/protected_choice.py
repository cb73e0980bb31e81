"""The recipe keys of depth methods that score each block alone, and protect the ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from prune_export.arch import Arch
from prune_export.errors import PlanError
from prune_export.pruning.depth import block_choice, part_choice, selection


@dataclass(frozen=True)
class ProtectedAmount(part_choice.Amount):
    """How many blocks or parts go, chosen one by one, at once or as a run; never at the ends."""

    contiguous: block_choice.Contiguous = False
    protect_first: Annotated[int, Field(ge=0, description="First blocks never removed.")] = 4
    protect_last: Annotated[int, Field(ge=0, description="Last blocks never removed.")] = 2
    select: selection.Select = "one_shot"

    def __post_init__(self) -> None:
        """Refuses what contradicts itself.

        Raises:
            PlanError: a run is to be chosen block by block, or what `Amount` refuses.
        """
        super().__post_init__()
        selection.refuse_run(self.select, self.contiguous)

    def candidates(self, arch: Arch) -> range:
        """The blocks that may go.

        Raises:
            PlanError: fewer are left than are to go.
        """
        possible = self.possible(arch)
        first, last = self.protect_first, arch.layers - self.protect_last
        candidates = range(max(first, possible.start), min(last, possible.stop))
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

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut."""
        if self.layers is None:
            self.candidates(arch)
        return super().predict(arch)
