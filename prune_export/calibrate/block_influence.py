"""Block influence: how much each block turns the residual states, over all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_export.calibrate.statistics import Scope
from prune_export.scores import turned


@dataclass(frozen=True)
class BlockInfluence:
    """`[layers]` float64: 1 - the mean cosine between what enters a block and what leaves it.

    Source: ShortGPT, arXiv:2403.03853, eq. 1.
    """

    samples: int | None = None
    length: int | None = None
    bypassed: ClassVar[tuple[int, ...]] = ()

    def collector(self, scope: Scope) -> _Collector:
        return _Collector(scope)


class _Collector:
    def __init__(self, scope: Scope) -> None:
        self._tokens = scope.samples * scope.length
        self._sums = torch.zeros(scope.layers, dtype=torch.float64)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del start
        for before, after in zip(inputs, outputs, strict=True):
            self._sums[layer] += turned(before, after).sum().cpu()

    def hear(self, dense: float, bypassed: Mapping[int, float]) -> None:
        del dense, bypassed

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"sums": self._sums}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sums.copy_(state["sums"])

    def result(self) -> torch.Tensor:
        return self._sums / self._tokens
