"""The model's loss with each block bypassed, one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from prune_export.calibrate.statistics import Scope


@dataclass(frozen=True)
class BypassLosses:
    """Mean next-token losses in nats: of the whole model, and without each of some blocks."""

    dense: float
    bypassed: Mapping[int, float]


@dataclass(frozen=True)
class BypassLoss:
    """`BypassLosses` for the blocks `layers`.

    All variants go through the blocks together, so that each block is loaded once; blocks before
    the bypassed one are computed once for all. That is about layers / 2 forward passes over the
    windows, which should therefore be few.

    Source: Shortened LLaMA, arXiv:2402.02834, section 3.
    """

    layers: tuple[int, ...]
    samples: int | None = None
    length: int | None = None

    @property
    def bypassed(self) -> tuple[int, ...]:
        return self.layers

    def collector(self, scope: Scope) -> _Collector:
        del scope
        return _Collector(self.layers)


class _Collector:
    def __init__(self, bypassed: tuple[int, ...]) -> None:
        self._bypassed = bypassed
        self._losses = torch.full((len(bypassed) + 1,), torch.nan, dtype=torch.float64)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del layer, start, inputs, outputs

    def hear(self, dense: float, bypassed: Mapping[int, float]) -> None:
        own = [dense, *(bypassed[layer] for layer in self._bypassed)]
        self._losses.copy_(torch.tensor(own, dtype=torch.float64))

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"losses": self._losses}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._losses.copy_(state["losses"])

    def result(self) -> BypassLosses:
        dense, *own = self._losses.tolist()
        return BypassLosses(dense, dict(zip(self._bypassed, own, strict=True)))
