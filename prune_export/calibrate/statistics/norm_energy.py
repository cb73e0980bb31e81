"""The share of each residual channel in the mean square that an RMSNorm divides by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from prune_export.calibrate.statistics.api import Collector, Scope
from prune_export.calibrate.streaming.skip import Unit

_ROLES: Final = ("norm.attn", "norm.attn.out", "norm.mlp", "norm.mlp.out")

EnergyShares = Mapping[tuple[int | None, str], torch.Tensor]
"""By block (None after the last) and the norm's role: float64 `[residual]`, of sum 1."""


@dataclass(frozen=True)
class NormEnergy:
    """Gathers `EnergyShares`: the mean over tokens of x_j² / Σ x², x the input of each norm."""

    samples: int | None = None
    length: int | None = None
    skipped: ClassVar[tuple[Unit, ...]] = ()

    def collector(self, scope: Scope) -> Collector:
        return _Collector(scope)


class _Collector:
    roles: ClassVar[tuple[str, ...]] = _ROLES

    def __init__(self, scope: Scope) -> None:
        self._last = scope.layers - 1
        self._sums = torch.zeros(
            len(_ROLES) * scope.layers + 1, scope.residual, dtype=torch.float64
        )

    def arrive(self, layer: int, role: str, states: torch.Tensor) -> None:
        self._add(len(_ROLES) * layer + _ROLES.index(role), states)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del start, inputs
        if layer == self._last:
            self._add(len(self._sums) - 1, outputs)

    def _add(self, row: int, states: torch.Tensor) -> None:
        squares = states.flatten(0, -2).float().square()
        whole = squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self._sums[row] += (squares / whole).sum(0).double().cpu()

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        del dense, skipped

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"sums": self._sums}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        self._sums = state["sums"]

    def result(self) -> EnergyShares:
        found: dict[tuple[int | None, str], torch.Tensor] = {}
        for row, sums in enumerate(self._sums):
            if bool(sums.any()):
                after = row == len(self._sums) - 1
                role = "norm.final" if after else _ROLES[row % len(_ROLES)]
                found[None if after else row // len(_ROLES), role] = sums / sums.sum()
        return found
