"""What all quantization methods share: the recipe keys of grids and targets, and the decision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.contracts import Decision
from prune_export.grids import Grid
from prune_export.pruning.sparse.targets import Roles, chosen_matrices, refuse_unknown_roles
from prune_export.surgery import Edit


@dataclass(frozen=True)
class QuantizeMethod:
    """The grid of each matrix, and which matrices: keys of every method.

    Raises:
        PlanError: an unknown role.
    """

    bits: Annotated[Literal[4, 8], Field(description="Bits of a weight's code.")] = 4
    group_size: Annotated[
        Literal[16, 32, 64, 128, 256],
        Field(description="Neighbouring inputs that share a scale: fewer are truer and larger."),
    ] = 32
    symmetric: Annotated[
        bool,
        Field(description="Zero is the middle code; else each group has a zero of its own."),
    ] = False
    include: Annotated[
        Roles | None,
        Field(min_length=1, description="Roles to quantize (`q`, `down` …); else all of blocks."),
    ] = None
    exclude: Annotated[Roles, Field(description="Roles to leave as they are.")] = ()
    layers: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None,
        Field(min_length=1, description="Blocks to quantize, counted from 0; else all."),
    ] = None

    def __post_init__(self) -> None:
        refuse_unknown_roles(self.include, self.exclude)

    def targets(self, arch: Arch) -> tuple[Tensor, ...]:
        """The matrices that are quantized.

        Raises:
            PlanError: a role or a block that the model does not have, or nothing is left.
        """
        return chosen_matrices(arch, self.include, self.exclude, self.layers)

    def predict(self, arch: Arch) -> Arch:
        """The shapes stay.

        Raises:
            PlanError: the targets are not of this model.
        """
        self.targets(arch)
        return arch

    def note(self, arch: Arch) -> str:
        """What the weights take in an engine, for the plan."""
        quantized = sum(prod(arch.shape(tensor)) for tensor in self.targets(arch))
        share = quantized / arch.parameters()
        return f"{share:.0%} of the weights in {self.bits_a_weight():.2f} bits each"

    def bits_a_weight(self) -> float:
        """Bits of a weight with its share of scales and zeros."""
        return self.bits + (16 + (0 if self.symmetric else self.bits)) / self.group_size


def decision(
    method: QuantizeMethod,
    edits: Iterable[Edit],
    grids: Mapping[str, Callable[[], Grid]],
    more: Mapping[str, Any],
) -> Decision:
    """Makes the decision: the weights on their grids, the grids, and the log."""
    kind = "symmetric" if method.symmetric else "asymmetric"
    log = {
        "grid": f"{method.bits} bits, groups of {method.group_size}, {kind}",
        "bits_a_weight": round(method.bits_a_weight(), 4),
        "matrices": len(grids),
        **more,
    }
    return Decision(edits, log, grids)
