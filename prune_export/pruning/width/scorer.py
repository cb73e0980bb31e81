"""How a width method scores units: from the states that pass, before anything is cut, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, LinearGroup, ModelView
from prune_export.calibrate.streaming.linear_groups import Accumulator

Scores = Mapping[str, torch.Tensor]
"""By axis (`mlp.3`, `moe.3.7`, `kv.3` for heads, `residual`, `expert.3`): one score a unit."""


@runtime_checkable
class StateScorer(Protocol):
    """Scores the inputs of linear groups from the states that arrive there."""

    def watch(self, group: LinearGroup, units: int, width: int, device: str) -> Accumulator:
        """Makes the accumulator of inputs `[…, width]`, `units` equal runs, that `score` reads."""

    def score(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], units: int, seen: Any
    ) -> torch.Tensor:
        """Scores a linear group's inputs, `[units]`; `weights` are its matrices `[out, in]`."""


@runtime_checkable
class ExpertScorer(StateScorer, Protocol):
    """A scorer of whole experts too; without it an expert counts as the sum of its channels."""

    def score_expert(
        self,
        group: LinearGroup,
        weights: Mapping[str, torch.Tensor],
        scores: torch.Tensor,
        seen: Any,
    ) -> float:
        """Scores an expert at its output projection; `scores` are those of its channels."""


@runtime_checkable
class ModelScorer(Protocol):
    """Scores units before any of them is cut: from weights, or gradients."""

    def passes(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The calibration passes that `scores` makes."""

    def scores(self, model: ModelView, axes: tuple[str, ...]) -> Scores:
        """Scores the units of each axis, in their shape (heads: `[kv, group]`)."""


Scorer = StateScorer | ModelScorer
