"""Covariances of the inputs of each norm, the final one included, for SliceGPT's PCA."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate.statistics.api import Scope
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.calibrate.streaming.skip import Unit

NORMS: Final = ("norm.attn", "norm.mlp")
"""The roles of the norms by which a block reads the residual states, in order."""


@dataclass(frozen=True)
class NormInputCovariance:
    """Gathers `Covariances`: mean outer products of each norm's inputs, scaled to length 1.

    Norms 2i and 2i + 1 are those of block i, the last one is the norm after all blocks: it is for
    models whose blocks have both. A norm makes all states equally long, so each token counts
    the same, however large its state.
    """

    samples: int | None = None
    length: int | None = None
    skipped: ClassVar[tuple[Unit, ...]] = ()

    def collector(self, scope: Scope) -> _Collector:
        return _Collector(scope)

    @staticmethod
    def ram_bytes(arch: Arch) -> int:
        """Bytes that it holds; where memory is short, all but two are kept on disk."""
        return (len(NORMS) * arch.layers + 3) * arch.sizes["residual"] ** 2 * 4


class Covariances:
    """The covariance of each norm's inputs by its number, float64 `[residual, residual]`, trace 1.

    They are in memory, or in a file that stays readable when the pass has ended.
    """

    def __init__(self, sums: Buffer, tokens: int) -> None:
        self._tokens = tokens
        self._rows = sums.rows
        self._sums = sums
        if sums.path is not None:
            self._sums = Buffer(sums.rows, sums.shape, sums.dtype, path=sums.path)
            weakref.finalize(self, self._sums.close)
        else:
            self._held = sums.read(0, sums.rows)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._sums.path is not None:
            found = self._sums.read(number, number + 1)[0]
        else:
            found = self._held[number]
        return found.double() / self._tokens


class _Collector:
    """Holds the sums of one block in memory, and the rest in a buffer."""

    roles: ClassVar[tuple[str, ...]] = NORMS

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        rows = len(NORMS) * scope.layers + 1
        self._buffer = scope.buffer("grams", rows, (scope.residual, scope.residual), torch.float32)
        self._sums: dict[str, torch.Tensor] = {}

    def arrive(self, layer: int, role: str, states: torch.Tensor) -> None:
        del layer
        self._add(role, states)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if layer == self._scope.layers - 1:
            self._add("norm.final", outputs)
        if start + len(inputs) == self._scope.samples:
            for place, role in enumerate(NORMS):
                self._write(len(NORMS) * layer + place, role)
            if "norm.final" in self._sums:
                self._write(len(NORMS) * self._scope.layers, "norm.final")

    def _add(self, role: str, states: torch.Tensor) -> None:
        rows = states.flatten(0, -2).float()
        rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        if role not in self._sums:
            width = self._scope.residual
            self._sums[role] = torch.zeros(width, width, device=rows.device)
        self._sums[role].addmm_(rows.T, rows)

    def _write(self, number: int, role: str) -> None:
        self._buffer.write(number, self._sums.pop(role)[None])

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        del dense, skipped

    def state(self) -> Mapping[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        del state

    def result(self) -> Covariances:
        return Covariances(self._buffer, self._scope.samples * self._scope.length)
