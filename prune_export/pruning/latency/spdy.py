"""SPDY: chooses a compression level for each part of a model within a time budget.

Each part has levels with an error and a time. Dynamic programming finds the levels with the least
sum of weighted errors; what the weights should be is found by trying, judged by the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

import numpy as np

from prune_export.errors import PlanError

_BUCKETS: Final = 10_000


@dataclass(frozen=True)
class Levels:
    """The compression levels of one part: the error and the time of each."""

    errors: tuple[float, ...]
    times: tuple[float, ...]


def cheapest(
    parts: Sequence[Levels], weights: Sequence[float], budget: float, buckets: int = _BUCKETS
) -> tuple[int, ...]:
    """Chooses a level for each part: the least sum of weighted errors within the time budget.

    Times are rounded up to `budget / buckets`, so the choice never takes longer than `budget`.

    Raises:
        PlanError: even the fastest levels take longer.
    """
    if budget <= 0 or sum(min(part.times) for part in parts) > budget:
        raise PlanError(
            "target",
            f"the fastest levels take {sum(min(part.times) for part in parts):.3g} of the dense "
            f"time, {max(budget, 0.0):.3g} is left for them",
            "ask for less speed, or remove blocks as well",
        )
    best = np.full(buckets + 1, np.inf)
    best[0] = 0.0
    chosen = []
    for part, weight in zip(parts, weights, strict=True):
        costs = [ceil(round(time / budget * buckets, 6)) for time in part.times]
        here = np.full((len(costs), buckets + 1), np.inf)
        for level, cost in enumerate(costs):
            if cost <= buckets:
                here[level, cost:] = best[: buckets + 1 - cost] + weight * part.errors[level]
        level = here.argmin(0)
        chosen.append((level, costs))
        best = here.min(0)
    at = int(best.argmin())
    if not np.isfinite(best[at]):
        raise PlanError(
            "target", "is met by no levels once times are rounded", "ask for a little less speed"
        )
    found = []
    for level, costs in reversed(chosen):
        found.append(int(level[at]))
        at -= costs[found[-1]]
    return tuple(reversed(found))


@dataclass(frozen=True)
class Choice:
    """The chosen levels, the weights that found them, and the losses of all tried, in order."""

    levels: tuple[int, ...]
    weights: tuple[float, ...]
    loss: float
    tried: tuple[float, ...]


def search(
    parts: Sequence[Levels],
    budget: float,
    loss_of: Callable[[tuple[int, ...]], float],
    *,
    tries: int,
    seed: int = 0,
) -> Choice:
    """Finds the levels with the least loss among `tries` weightings of the parts' errors.

    The first weighs all alike. Half of the others are random, the rest change some of the best
    one's weights: a tenth of them at first, fewer and fewer, and one at last. Levels that come up
    again are not judged again.

    Source: Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees",
    arXiv:2201.13096, section 3.
    """
    random = np.random.default_rng(seed)
    known: dict[tuple[int, ...], float] = {}
    weights = np.ones(len(parts))
    best: tuple[float, np.ndarray, tuple[int, ...]] | None = None
    tried = []
    for number in range(tries):
        if number and number <= tries // 2:
            weights = random.uniform(size=len(parts))
        elif number and best is not None:
            weights = best[1].copy()
            left = (tries - number) / max(1, tries - tries // 2)
            some = max(1, round(0.1 * left * len(parts)))
            weights[random.choice(len(parts), some, replace=False)] = random.uniform(size=some)
        levels = cheapest(parts, weights.tolist(), budget)
        if levels not in known:
            known[levels] = loss_of(levels)
            tried.append(known[levels])
        if best is None or known[levels] < best[0]:
            best = known[levels], weights, levels
    assert best is not None
    return Choice(best[2], tuple(best[1].tolist()), best[0], tuple(tried))
