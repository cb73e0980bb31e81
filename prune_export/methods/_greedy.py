"""Removes one unit after another by the measured loss, asking for as few forward passes as it can.

What a unit's removal costs changes slowly while others are removed, so each round measures only the
units whose last known costs are the least. These race: all of them on a few windows, the better
half on twice as many, and so on, until the last ones are compared on all windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_export.calibrate import Removals, Unit


@dataclass(frozen=True)
class _Way:
    """A model on the way: what it goes without, its loss, and what further removals would cost.

    `costs` are the last known increases of the loss (nats) by units that are still there.
    """

    gone: tuple[Unit, ...] = ()
    loss: float = 0.0
    costs: Mapping[Unit, float] = field(default_factory=dict)
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Found:
    """What to remove, in the order of removal, and what each removal did."""

    order: tuple[Unit, ...]
    dense_loss: float
    loss: float
    first_costs: Mapping[Unit, float]
    steps: tuple[Mapping[str, Any], ...]


def greedy(
    removals: Removals, units: Collection[Unit], count: int, *, shortlist: int, beam: int = 1
) -> Found:
    """`count` of `units`, each the one whose removal raised the loss of what was left least.

    `shortlist` units race for each removal; for the first, all do. With a `beam`, the best so many
    sets of units are followed. Of equal losses the deeper unit goes.
    """
    (dense,) = removals.losses([()], keep=[()])
    ways = [_Way((), dense, dict.fromkeys(units, 0.0))]
    first: dict[Unit, float] = {}
    for number in range(count):
        racers: dict[frozenset[Unit], tuple[_Way, Unit]] = {}
        for way in ways:
            order = sorted(way.costs, key=lambda unit: (way.costs[unit], -unit.layer))
            for unit in order[: shortlist if number else None]:
                racers.setdefault(frozenset((*way.gone, unit)), (way, unit))
        ranked, costs = _race(removals, list(racers.values()), ways, beam)
        if not number:
            first = dict(costs[ways[0].gone])
        best = [loss for loss, _, _ in ranked]
        following = []
        for place, (loss, way, unit) in enumerate(ranked[:beam]):
            known = {**way.costs, **costs.get(way.gone, {})}
            del known[unit]
            step: dict[str, Any] = {
                "layer": unit.layer,
                "loss": loss,
                "increase": loss - way.loss,
                "measured": len(racers),
            }
            if place + 1 < len(ranked):
                step["runner_up"] = ranked[place + 1][2].layer
                step["margin"] = best[place + 1] - loss
            following.append(_Way((*way.gone, unit), loss, known, (*way.steps, step)))
        ways = following
    won = ways[0]
    return Found(won.gone, dense, won.loss, first, won.steps)


def _race(
    removals: Removals, racers: Sequence[tuple[_Way, Unit]], ways: Sequence[_Way], beam: int
) -> tuple[list[tuple[float, _Way, Unit]], dict[tuple[Unit, ...], dict[Unit, float]]]:
    """The last racers from the best on, on all chunks; and all racers' costs, on what they saw."""
    left, chunks = list(racers), 1
    costs: dict[tuple[Unit, ...], dict[Unit, float]] = {}
    keep = [way.gone for way in ways]
    while True:
        losses = removals.losses(
            [(*way.gone, unit) for way, unit in left], chunks=chunks, keep=keep
        )
        before = dict(zip(keep, removals.losses(keep, chunks=chunks, keep=keep), strict=True))
        for loss, (way, unit) in zip(losses, left, strict=True):
            costs.setdefault(way.gone, {})[unit] = loss - before[way.gone]
        ranked = sorted(
            ((loss, way, unit) for loss, (way, unit) in zip(losses, left, strict=True)),
            key=lambda racer: (racer[0], -racer[2].layer),
        )
        if chunks >= removals.chunks:
            return ranked, costs
        chunks = min(2 * chunks, removals.chunks)
        half = max(-(-len(left) // 2), beam + 1)
        left = [(way, unit) for _, way, unit in ranked[:half]]
