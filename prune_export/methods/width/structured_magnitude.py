"""Removes channels, heads and hidden dimensions by the size of their weights; needs no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView
from prune_export.pruning.width import unit_scores
from prune_export.pruning.width.scorer import Scores
from prune_export.pruning.width.width_method import WidthMethod


@dataclass(frozen=True)
class StructuredMagnitude(WidthMethod):
    """Cut the units with the smallest weights, over all matrices that a unit is part of.

    Of an MLP channel these are its rows in gate and up and its column in down; of a head its
    queries, its column in the output projection, and its share of the keys and values.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv:1608.08710, section 3, over
    coupled groups as in Fang et al., "DepGraph", arXiv:2301.12900, section 3.3.
    Differs: the projections are refitted on calibration data; with `compensate: false` none is
    read.
    """

    VERSION: ClassVar[str] = "1"

    norm: Annotated[
        Literal["l1", "l2"], Field(description="Sum of sizes, or of squares, of the weights.")
    ] = "l2"

    @property
    def scorer(self) -> _Magnitude:
        return _Magnitude(self.norm)


@dataclass(frozen=True)
class _Magnitude:
    norm: Literal["l1", "l2"]

    def passes(self, arch: Arch) -> tuple[ExtraPass, ...]:
        del arch
        return ()

    def scores(self, model: ModelView, axes: tuple[str, ...]) -> Scores:
        value = torch.Tensor.square if self.norm == "l2" else torch.Tensor.abs
        scores = unit_scores.of_weights(model, axes, value)
        unit_scores.complete(model.arch, axes, scores)
        return scores
