"""Minitron's activation scores: each unit's size, aggregated over a window, then over windows."""

from __future__ import annotations

from typing import Literal

import torch

Aggregation = Literal["mean", "l2", "variance"]


class Activations:
    """Accumulates activation sizes: |x| of a channel, the norm of a head's output.

    Each window is summed up by `sequence`, and the windows by `batch`. Tokens of an expert come as
    they are routed: they are one window.
    """

    def __init__(
        self,
        units: int,
        width: int,
        device: str,
        *,
        sequence: Aggregation,
        batch: Aggregation,
        whole: bool,
    ) -> None:
        self._run, self._sequence, self._batch, self._whole = width // units, sequence, batch, whole
        self._moments = torch.zeros(2, units, dtype=torch.float64, device=device)
        self._count = 0

    def see(self, states: torch.Tensor) -> None:
        """Adds inputs `[samples, length, in]`."""
        sizes = states.float()
        sizes = (
            sizes.abs()
            if self._run == 1
            else sizes.view(*sizes.shape[:-1], -1, self._run).norm(dim=-1)
        )
        if self._whole:
            sums, squares = sizes.sum(1), sizes.square().sum(1)
            rows = _made(self._sequence, sums, squares, sizes.shape[1])
        else:
            rows = sizes.flatten(0, 1)
        self._moments[0] += rows.sum(0)
        self._moments[1] += rows.square().sum(0)
        self._count += len(rows)

    def result(self) -> torch.Tensor:
        """The scores `[units]`, float64; zeros where no token came."""
        if not self._count:
            return self._moments[0]
        how = self._batch if self._whole else self._sequence
        return _made(how, self._moments[0], self._moments[1], self._count)


def _made(how: Aggregation, sums: torch.Tensor, squares: torch.Tensor, count: int) -> torch.Tensor:
    if how == "mean":
        return sums / count
    if how == "l2":
        return squares.sqrt()
    return (squares / count - (sums / count).square()).clamp_min(0)
