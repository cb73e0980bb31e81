"""Removes channels, heads and hidden dimensions whose activations are small (Minitron)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import InputNorms, LinearGroup, ModelView
from prune_export.errors import PlanError
from prune_export.pruning.width import head_residual as residual_of_heads
from prune_export.pruning.width.activation_scores import Activations, Aggregation
from prune_export.pruning.width.scorer import Scores
from prune_export.pruning.width.width_method import WidthMethod


@dataclass(frozen=True)
class Minitron(WidthMethod):
    """Cut what is least active: MLP channels, heads, hidden dimensions, experts.

    A channel counts by the input that it gives to the projection back; a head by the norm of its
    output; a hidden dimension by what the blocks' matrices read of it, summed over all of them; an
    expert by what it adds to the residual state.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation",
    arXiv:2407.14679, section 2.2.
    Differs: MLP channels count after the activation and the gate (as in NVIDIA's ModelOpt); the
    projections are refitted to what is left; blocks are scored behind the cut ones, where their
    inputs come from; heads go in equal numbers from each group, but which ones is the group's own.
    """

    VERSION: ClassVar[str] = "1"

    sequence: Annotated[
        Aggregation, Field(description="How sizes are summed up over the tokens of a window.")
    ] = "mean"
    batch: Annotated[Aggregation, Field(description="And then over windows.")] = "l2"

    head_residual: Annotated[
        bool,
        Field(
            description="Let each kept head of a low rank move away from a removed one, in all of "
            "its own weights; only where heads share no keys, and instead of a refit."
        ),
    ] = False

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; with `per_layer` they stay, as what goes is zeroed."""
        if self.head_residual:
            residual_of_heads.check(arch, self.sizes(arch), self.compensate)
            if self.per_layer:
                raise PlanError(
                    "head_residual",
                    "got `per_layer`, where a block may keep too few heads to move",
                    "leave one of them out",
                )
        return super().predict(arch)

    def reworked(
        self, model: ModelView, kept: Mapping[str, torch.Tensor], scores: Scores
    ) -> dict[str, Callable[[], torch.Tensor]]:
        if not self.head_residual:
            return {}
        found: dict[str, Callable[[], torch.Tensor]] = {}
        for axis, flags in kept.items():
            if axis.startswith("kv."):
                keep = int(flags.sum())
                found |= residual_of_heads.moved(
                    model.arch, axis, scores[axis], keep, model.checkpoint.read
                )
        return found

    @property
    def scorer(self) -> _Activity:
        return _Activity(self.sequence, self.batch, experts="experts" in self.fractions)


@dataclass(frozen=True)
class _Activity:
    sequence: Aggregation
    batch: Aggregation
    experts: bool

    def watch(self, group: LinearGroup, units: int, width: int, device: str) -> _Sizes:
        return _Sizes(self, group, units, width, device)

    def score(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], units: int, seen: _Sizes
    ) -> torch.Tensor:
        del group, weights, units
        return seen.sizes.result()

    def score_expert(
        self,
        group: LinearGroup,
        weights: Mapping[str, torch.Tensor],
        scores: torch.Tensor,
        seen: _Sizes,
    ) -> float:
        del group, scores
        (down,) = weights.values()
        assert seen.squares is not None
        return float((down.square().sum(0) * seen.squares.sums).sum().sqrt())


class _Sizes:
    def __init__(
        self, own: _Activity, group: LinearGroup, units: int, width: int, device: str
    ) -> None:
        self.sizes = Activations(
            units,
            width,
            device,
            sequence=own.sequence,
            batch=own.batch,
            whole=group.expert is None,
        )
        self.squares = None
        if group.expert is not None and own.experts:
            self.squares = InputNorms(width, device)

    def see(self, states: torch.Tensor) -> None:
        self.sizes.see(states)
        if self.squares is not None:
            self.squares.see(states)
