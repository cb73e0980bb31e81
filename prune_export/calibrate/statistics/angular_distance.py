"""Angular distance between the residual states at any two depths, of each window's last token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_export.calibrate.statistics.api import Scope
from prune_export.calibrate.streaming.skip import Unit
from prune_export.numeric.scores import angles


@dataclass(frozen=True)
class AngularDistance:
    """`[layers + 1, layers + 1]` float64: the mean angle in units of pi; symmetric.

    Point l is the residual state that enters block l, the last point what leaves the last block,
    before the final norm. Only the last token of each window counts.

    Source: Gromov et al., arXiv:2403.17887, eq. 7.
    Differs: accurate for nearly parallel states, in float64 (`scores.angles`).
    """

    samples: int | None = None
    length: int | None = None
    skipped: ClassVar[tuple[Unit, ...]] = ()

    def collector(self, scope: Scope) -> _Collector:
        return _Collector(scope)


class _Collector:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        points = (scope.layers + 1) * scope.samples
        self._points = scope.buffer("last-tokens", points, (scope.residual,), torch.float32)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self._points.write(layer * self._scope.samples + start, inputs[:, -1])
        if layer == self._scope.layers - 1:
            self._points.write((layer + 1) * self._scope.samples + start, outputs[:, -1])

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        del dense, skipped

    def state(self) -> Mapping[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        del state

    def result(self) -> torch.Tensor:
        count, points = self._scope.samples, self._scope.layers + 1
        total = torch.zeros(points, points, dtype=torch.float64)
        for sample in range(count):
            rows = [self._points.read(i, i + 1) for i in range(sample, points * count, count)]
            total += angles(torch.cat(rows).cpu())
        return total / count
