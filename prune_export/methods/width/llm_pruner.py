"""Removes the coupled structures that the loss depends on least, by Taylor expansion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView, block_bytes
from prune_export.errors import PlanError
from prune_export.pruning.width import unit_scores
from prune_export.pruning.width.scorer import Scores
from prune_export.pruning.width.width_method import WidthMethod

Importance = Literal["vector", "first", "fisher", "mixed"]


@dataclass(frozen=True)
class LlmPruner(WidthMethod):
    """Cut the units whose removal changes the loss least, estimated from gradients.

    With w a weight, g its gradient and F the mean square of its windows' gradients, a weight counts
    |w g| (`first`), w² F / 2 (`fisher`) or |w g - w² F / 2| (`mixed`), and all weights of a unit
    are summed up; `vector` sums w g with its signs. The sums of a unit's matrices (gate, up, down)
    are put together by `aggregate`.

    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models",
    arXiv:2305.11627, section 3.2.
    Differs: a key-value head leaves with its queries only where `kv_groups` says so; every block
    loses as much, so that stock classes load the model, unless `per_layer` is set (the paper keeps
    the first 4 and the last 2 blocks: `protect_first`, `protect_last`); all calibration windows are
    used; fused matrices are one matrix; the projections are refitted.
    """

    VERSION: ClassVar[str] = "1"

    importance: Annotated[
        Importance, Field(description="What a weight counts, from its gradient.")
    ] = "first"
    aggregate: Annotated[
        unit_scores.Aggregate, Field(description="How a unit's matrices are put together.")
    ] = "sum"
    protect_first: Annotated[
        int, Field(ge=0, description="First blocks left whole; needs `per_layer`.")
    ] = 0
    protect_last: Annotated[
        int, Field(ge=0, description="Last blocks left whole; needs `per_layer`.")
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.protect_first or self.protect_last) and not self.per_layer:
            raise PlanError(
                "protect_first, protect_last",
                "got blocks to leave whole, but all blocks are to have one width",
                "write `per_layer: true`",
            )

    def protected(self, arch: Arch) -> frozenset[int]:
        """The protected blocks: the first and last ones.

        Raises:
            PlanError: no block is left.
        """
        last = arch.layers - self.protect_last
        if last <= self.protect_first:
            raise PlanError(
                "protect_first, protect_last",
                f"leave none of {arch.layers} blocks to cut",
                "lower them",
            )
        return frozenset({*range(self.protect_first), *range(last, arch.layers)})

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; with `per_layer` they stay, as what goes is zeroed."""
        self.protected(arch)
        return super().predict(arch)

    @property
    def scorer(self) -> _Taylor:
        return _Taylor(self.importance, self.aggregate)


@dataclass(frozen=True)
class _Taylor:
    importance: Importance
    aggregate: unit_scores.Aggregate

    def passes(self, arch: Arch) -> tuple[ExtraPass, ...]:
        return (ExtraPass(forwards=4, ram_bytes=3 * block_bytes(arch, torch.float32)),)

    def scores(self, model: ModelView, axes: tuple[str, ...]) -> Scores:
        windows = model.calibration().tokens.samples
        reader = unit_scores.UnitReader(
            model.arch,
            axes,
            f"llm_pruner-1 {self.importance} {self.aggregate} {windows} {' '.join(axes)}",
            _KINDS[self.importance],
            _Value(self.importance, windows),
            aggregate=self.aggregate,
        )
        scores = unit_scores.of_gradients(model.gradients(reader), axes)
        unit_scores.complete(model.arch, axes, scores)
        return scores


_KINDS: dict[Importance, tuple[Any, ...]] = {
    "vector": ("sum",),
    "first": ("sum",),
    "fisher": ("square",),
    "mixed": ("sum", "square"),
}


@dataclass(frozen=True)
class _Value:
    importance: Importance
    windows: int

    def __call__(self, weight: torch.Tensor, sums: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self.importance == "fisher":
            return weight.square() * sums["square"] / (2 * self.windows)
        first = weight * sums["sum"] / self.windows
        if self.importance == "mixed":
            first = first - weight.square() * sums["square"] / (2 * self.windows)
        return first if self.importance == "vector" else first.abs()
