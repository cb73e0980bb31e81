"""Removes channels, heads and hidden dimensions by Wanda's score, summed over a structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.calibrate import InputNorms, LinearGroup
from prune_export.pruning.width.width_method import WidthMethod


@dataclass(frozen=True)
class StructuredWanda(WidthMethod):
    """Cut the inputs of projections with the least |weight| x norm of the input, over all outputs.

    With `norm: l2` it is the square of what the output loses if the input alone goes missing. A
    head's is the sum of its inputs', a hidden dimension's of all matrices that read it.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, eq. 1, summed up over a structure as in An et al., "Fluctuation-based Adaptive
    Structured Pruning", arXiv:2312.11983, section 3.
    Differs: the projections are refitted by least squares instead of given a bias.
    """

    VERSION: ClassVar[str] = "1"

    norm: Annotated[
        Literal["l1", "l2"],
        Field(description="How the weights of one input are put together: sizes or squares."),
    ] = "l2"

    @property
    def scorer(self) -> _Wanda:
        return _Wanda(self.norm)


@dataclass(frozen=True)
class _Wanda:
    norm: Literal["l1", "l2"]

    def watch(self, group: LinearGroup, units: int, width: int, device: str) -> InputNorms:
        del group, units
        return InputNorms(width, device)

    def score(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], units: int, seen: InputNorms
    ) -> torch.Tensor:
        del group
        total = torch.zeros(len(seen.sums), dtype=torch.float64, device=seen.sums.device)
        for weight in weights.values():
            if self.norm == "l2":
                total += weight.square().sum(0) * seen.sums
            else:
                total += weight.abs().sum(0) * seen.sums.sqrt()
        return total.view(units, -1).sum(1)
