"""The model's loss with each block (or its attention, or its MLP) skipped, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from prune_export.calibrate.statistics.api import Scope
from prune_export.calibrate.streaming.skip import Part, Unit


@dataclass(frozen=True)
class SkipLosses:
    """Mean next-token losses in nats: of the whole model, and with each block or part skipped.

    `skipped` has the losses by block, also where only a part of the block was left out.
    """

    dense: float
    skipped: Mapping[int, float]


@dataclass(frozen=True)
class SkipLoss:
    """Gathers `SkipLosses` for the blocks `layers`, or for a `part` (attention, MLP) of each.

    All variants go through the blocks together, so that each block is loaded once; blocks before
    the skipped one are computed once for all. That is about layers / 2 forward passes over the
    windows, which should therefore be few.

    Source: Shortened LLaMA, arXiv:2402.02834, section 3.
    """

    layers: tuple[int, ...]
    samples: int | None = None
    length: int | None = None
    part: Part = "block"

    @property
    def skipped(self) -> tuple[Unit, ...]:
        return tuple(Unit(layer, self.part) for layer in self.layers)

    def collector(self, scope: Scope) -> _Collector:
        del scope
        return _Collector(self.skipped)


class _Collector:
    def __init__(self, skipped: tuple[Unit, ...]) -> None:
        self._skipped = skipped
        self._losses = torch.full((len(skipped) + 1,), torch.nan, dtype=torch.float64)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del layer, start, inputs, outputs

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        own = [dense, *(skipped[unit] for unit in self._skipped)]
        self._losses.copy_(torch.tensor(own, dtype=torch.float64))

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"losses": self._losses}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._losses.copy_(state["losses"])

    def result(self) -> SkipLosses:
        dense, *own = self._losses.tolist()
        by_block = {unit.layer: loss for unit, loss in zip(self._skipped, own, strict=True)}
        return SkipLosses(dense, by_block)
