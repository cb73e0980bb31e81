"""Tensor functions that methods and statistics share: angles, sums over runs, order."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch


def angles(points: torch.Tensor) -> torch.Tensor:
    """Computes the angle between each two rows, `[points, points]` in units of pi, float64.

    As 2 atan2(|u-v|, |u+v|) of unit vectors: arccos of a cosine near 1 loses half of the digits.
    """
    unit = _unit(points.double())
    found = torch.zeros(len(unit), len(unit), dtype=torch.float64, device=points.device)
    for i in range(1, len(unit)):
        apart, together = (unit[:i] - unit[i]).norm(dim=-1), (unit[:i] + unit[i]).norm(dim=-1)
        found[i, :i] = 2 * torch.atan2(apart, together) / pi
    return found + found.T


def turned(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Computes 1 - cos of the angle between paired rows, float64.

    As |u-v|²/2 of unit vectors, which keeps its digits where the two are almost parallel.
    """
    return (_unit(before.double()) - _unit(after.double())).square().sum(-1) / 2


def _unit(rows: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(rows.dtype).tiny
    norms: torch.Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / norms.clamp_min(tiny)


def runs(distances: torch.Tensor, remove: int) -> list[float]:
    """Takes the distance across each run of `remove` blocks, by the run's first block.

    `distances` is `[layers + 1, layers + 1]` between the points where residual states stand.
    """
    return [float(distance) for distance in torch.diagonal(distances, offset=remove)]


def run_sums(scores: Sequence[float], remove: int) -> list[float]:
    """Sums the scores of each run of `remove` blocks, by the run's first block."""
    return [sum(scores[i : i + remove]) for i in range(len(scores) - remove + 1)]


def least(scores: Sequence[float]) -> list[int]:
    """Sorts positions by ascending score; of equal scores the later (deeper) comes first.

    Deeper blocks are the safer ones to remove, and the order must not depend on chance.
    """
    return sorted(range(len(scores)), key=lambda i: (scores[i], -i))
