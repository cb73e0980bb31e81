"""Decides from noisy timings whether one engine is faster than another: pure statistics.

Timings on a shared machine are wrong in three ways, and each is met:

- **Bursts and drift.** Another process takes half of the machine for a while. A round times every
  engine once, in random order and back to back, and only ratios within a round are used: what
  lasts longer than a round cancels, and a drift has no sign. Heavy tails are met by the median of
  the ratios; a ratio of medians would not do, because the medians may fall into different regimes.
- **Luck of a process.** Where memory lands, which pages are huge: a process keeps such luck for its
  life, however many rounds are timed. So there are several *launches*, each with fresh processes,
  and the bootstrap draws launches, and rounds within them. In our simulation (tests) with 3 % of
  such luck, 24 rounds of a single launch claim a difference between equal engines in 4 to 14 % of
  the comparisons, 6 rounds in each of three launches in 0.12 % (9 of 7,500), 4 rounds in each of
  five in none of 7,500.
- **Unknown unknowns.** Two processes of the same dense engine run in the same rounds (A/A). The
  interval of their ratio, made symmetric about 1 and never narrower than 2 %, is the noise floor.

A difference is claimed only when its whole 95 % interval lies outside of the floor. That is far
stricter than 95 %: both intervals must fail at once, so thirty comparisons of a model with itself
claim nothing (`benchmarks/noise_floor.py`).

Source: T. Kalibera and R. Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013, sections 5
and 6 (random effects at each level of repetition). Differs: medians, and the A/A floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from prune_export.verify.results import Verdict

FLOOR: Final = 0.02
"""Differences below this are never claimed."""
CONFIDENCE: Final = 0.95
_DRAWS: Final = 4000

Launches = Sequence[Sequence[float]]
"""Seconds: one sequence a launch, one sample a round."""


@dataclass(frozen=True)
class Comparison:
    """`ratio` is dense / pruned time; `low`, `high` its interval; `floor_*` that of dense/dense."""

    ratio: float
    low: float
    high: float
    floor_low: float
    floor_high: float
    verdict: Verdict

    @property
    def width(self) -> float:
        """The wider of the two intervals, as a fraction of the ratio it is about."""
        return max((self.high - self.low) / self.ratio, self.floor_high - self.floor_low)


def compare(dense: Launches, again: Launches, pruned: Launches, *, seed: int = 0) -> Comparison:
    """Compares `pruned` with `dense`; `again` is the second process of the dense engine.

    The three have the same number of launches, and in a launch the same number of rounds.
    """
    random = np.random.default_rng(seed)
    effect = _log_ratios(dense, pruned)
    low, high = _interval(effect, random)
    floor_low, floor_high = _interval(_log_ratios(dense, again), random)
    floor = max(-floor_low, floor_high, np.log1p(FLOOR))
    verdict: Verdict = "no speedup"
    if low > floor:
        verdict = "faster"
    elif high < -floor:
        verdict = "slower"
    return Comparison(
        ratio=float(np.exp(np.median(np.concatenate(effect)))),
        low=float(np.exp(low)),
        high=float(np.exp(high)),
        floor_low=float(np.exp(-floor)),
        floor_high=float(np.exp(floor)),
        verdict=verdict,
    )


def _log_ratios(above: Launches, below: Launches) -> list[np.ndarray]:
    """Computes the log ratio of each round, one array a launch."""
    pairs = zip(above, below, strict=True)
    return [np.log(np.asarray(a, float)) - np.log(np.asarray(b, float)) for a, b in pairs]


def _interval(launches: list[np.ndarray], random: np.random.Generator) -> tuple[float, float]:
    """Bootstraps a percentile interval of the median: draws launches, then rounds within each."""
    sizes = np.array([len(launch) for launch in launches])
    table = np.full((len(launches), sizes.max()), np.nan)
    for row, launch in zip(table, launches, strict=True):
        row[: len(launch)] = launch
    chosen = random.integers(0, len(launches), (_DRAWS, len(launches)))
    # As many rounds as the chosen launch has are drawn from it; the rest of the row stays empty.
    rounds = (random.random((*chosen.shape, sizes.max())) * sizes[chosen][..., None]).astype(int)
    drawn = table[chosen[..., None], rounds]
    drawn[np.arange(sizes.max()) >= sizes[chosen][..., None]] = np.nan
    middle = np.median if (sizes == sizes[0]).all() else np.nanmedian
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(middle(drawn.reshape(_DRAWS, -1), axis=1), [tail, 1 - tail])
    return float(low), float(high)
