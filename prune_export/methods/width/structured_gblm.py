"""Removes channels and heads by weight, input norm and gradient: GBLM-Pruner's score, summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar, Final, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.arch.roles import OUTPUT_PROJECTIONS
from prune_export.calibrate import (
    LINEAR_GROUPS,
    ExtraPass,
    InputNorms,
    LinearGroup,
    ModelView,
    block_bytes,
)
from prune_export.pruning.width import unit_scores
from prune_export.pruning.width.scorer import Scores
from prune_export.pruning.width.width_method import WidthMethod

_WINDOWS: Final = 128
"""The number of windows that alpha was published for."""


@dataclass(frozen=True)
class StructuredGblm(WidthMethod):
    """Cut the inputs of projections with the least |weight| x (norm of input + alpha x gradient).

    GBLM-Pruner's score of a weight, summed over all weights that an input of a projection back to
    the residual state has; of a hidden dimension, over all matrices that read it, and by gradient
    also over those that write it.

    Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language
    Models", arXiv:2311.04902, section 3, with alpha as the released code weighs it.
    Differs: the paper scores single weights; sums are brought to 128 windows; inputs are seen
    behind the blocks that are already cut; the projections are refitted.
    """

    VERSION: ClassVar[str] = "1"

    alpha: Annotated[float, Field(ge=0, description="How much gradients weigh beside inputs.")] = (
        100.0
    )
    norm: Annotated[
        Literal["l1", "l2"],
        Field(
            description="Over windows, of a weight's gradients: sum of sizes, or root of squares."
        ),
    ] = "l1"

    @property
    def scorer(self) -> _Gblm:
        return _Gblm(self.alpha, self.norm)


@dataclass(frozen=True)
class _Gblm:
    alpha: float
    norm: Literal["l1", "l2"]

    def passes(self, arch: Arch) -> tuple[ExtraPass, ...]:
        return (ExtraPass(forwards=4, ram_bytes=3 * block_bytes(arch, torch.float32)),)

    def scores(self, model: ModelView, axes: tuple[str, ...]) -> Scores:
        samples, length = model.calibration().tokens.ids.shape
        # Inputs count by their root mean square over tokens; sums over a window of `length` are
        # sqrt(length) times that.
        of_sum = _WINDOWS if self.norm == "l1" else sqrt(_WINDOWS)
        reader = unit_scores.UnitReader(
            model.arch,
            axes,
            f"structured_gblm-1 {self.norm} {self.alpha} {samples} {length} {' '.join(axes)}",
            ("abs",) if self.norm == "l1" else ("square",),
            _Value(self.norm, samples, self.alpha * of_sum / sqrt(length)),
            roles=frozenset(LINEAR_GROUPS) if "residual" in axes else OUTPUT_PROJECTIONS,
        )
        scores = unit_scores.of_gradients(model.gradients(reader), axes)
        unit_scores.complete(model.arch, axes, scores)
        return scores

    def watch(self, group: LinearGroup, units: int, width: int, device: str) -> InputNorms:
        del group, units
        return InputNorms(width, device)

    def score(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], units: int, seen: InputNorms
    ) -> torch.Tensor:
        del group
        norms = (seen.sums / max(1, seen.tokens)).sqrt().double()
        total = torch.zeros_like(norms)
        for weight in weights.values():
            total += weight.abs().sum(0) * norms
        return total.view(units, -1).sum(1)


@dataclass(frozen=True)
class _Value:
    norm: str
    windows: int
    share: float

    def __call__(self, weight: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.norm == "l1":
            size = sums["abs"] / self.windows
        else:
            size = (sums["square"] / self.windows).sqrt()
        return weight.abs() * size * self.share
