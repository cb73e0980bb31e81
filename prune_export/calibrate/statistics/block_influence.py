"""Block influence (ShortGPT): how much each block, or a part of it, turns the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_export.calibrate.statistics.api import Collector, Scope
from prune_export.calibrate.streaming.skip import Part, Unit
from prune_export.numeric.scores import turned


@dataclass(frozen=True)
class BlockInfluence:
    """`[layers]` float64: 1 - the mean cosine between the input of a block and its output.

    Of a `part`, between the residual states before and after its output is added to them.

    Source: ShortGPT, arXiv:2403.03853, eq. 1; of parts, He et al., arXiv:2406.15786.
    """

    samples: int | None = None
    length: int | None = None
    part: Part = "block"
    skipped: ClassVar[tuple[Unit, ...]] = ()

    def collector(self, scope: Scope) -> Collector:
        return _Collector(scope) if self.part == "block" else _OfPart(scope, self.part)


class _Turns:
    def __init__(self, scope: Scope) -> None:
        self._tokens = scope.samples * scope.length
        self._sums = torch.zeros(scope.layers, dtype=torch.float64)

    def _add(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        for one, other in zip(before, after, strict=True):
            self._sums[layer] += turned(one, other).sum().cpu()

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        del dense, skipped

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"sums": self._sums}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sums.copy_(state["sums"])

    def result(self) -> torch.Tensor:
        return self._sums / self._tokens


class _Collector(_Turns):
    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del start
        self._add(layer, inputs, outputs)


class _OfPart(_Turns):
    def __init__(self, scope: Scope, part: Part) -> None:
        super().__init__(scope)
        self.part: Part = part

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del layer, start, inputs, outputs

    def step(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self._add(layer, before, after)
