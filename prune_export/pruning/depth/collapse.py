"""Merges adjacent layers into one (LaCo), and searches which: by threshold or by number."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from math import log
from typing import Final, Literal

from prune_export.calibrate import Chain, MergeSimilarity

Runs = tuple[tuple[int, int], ...]
"""Where runs begin, and how many layers of each are merged."""

Merge = Literal["rdsc", "last", "drop"]

_JOINT: Final = 8
"""Combinations of runs that are measured together, of those that promise most."""

_LOWER: Final = 0.05
"""By how much the threshold falls when algorithm 1 ended before enough layers were merged."""

_BISECTIONS: Final = 7
"""Halvings of the threshold's range: to 0.016."""


@dataclass(frozen=True)
class Fold:
    """One merge: `layers` layers after the one with the norms of block `of` went into it."""

    of: int
    layers: int
    similarity: float


@dataclass(frozen=True)
class Collapsed:
    """A model with merged layers, its merges, and the threshold that gave it, if any."""

    chain: Chain
    folds: tuple[Fold, ...] = ()
    threshold: float | None = None

    @property
    def count(self) -> int:
        """The number of layers removed by merging."""
        return sum(fold.layers for fold in self.folds)


def folded(chain: Chain, at: int, count: int, merge: Merge) -> Chain:
    """Merges the `count` layers after layer `at` of a chain into it.

    `rdsc`: theta + sum over k of (theta_k - theta). `last`: what the paper's released code does,
    as its sum telescopes: the last layer's matrices under the first one's norms. `drop`: the first
    layer as it is.
    """
    first, others = chain[at], chain[at + 1 : at + 1 + count]
    if merge == "drop":
        made = first
    elif merge == "last":
        made = replace(first, weights=others[-1].weights)
    else:
        sums: dict[int, float] = defaultdict(float)
        for block, weight in first.weights:
            sums[block] += (1 - count) * weight
        for layer in others:
            for block, weight in layer.weights:
                sums[block] += weight
        kept = tuple(sorted((block, weight) for block, weight in sums.items() if weight))
        made = replace(first, weights=kept)
    return (*chain[:at], made, *chain[at + 1 + count :])


@dataclass(frozen=True)
class FoldSearch:
    """Searches for merges; `similar` measures a chain, and keeps the states of `keep`."""

    model: MergeSimilarity
    merge: Merge
    merge_layers: int
    interval: int
    lowest: int
    highest: int

    def sweep(
        self, threshold: float, most: int | None = None, start: Collapsed | None = None
    ) -> Collapsed:
        """Runs algorithm 1 of the paper, from the top down, until `most` layers are merged."""
        found = start or Collapsed(self.model.dense)
        chain, folds = found.chain, list(found.folds)
        left = len(chain) if most is None else most - found.count
        end = self.highest - found.count
        at = max(end - self.merge_layers, self.lowest)
        while at >= self.lowest and left:
            count = min(self.merge_layers - 1, end - at - 1, left)
            if count < 1:
                at -= 1
                continue
            tried = folded(chain, at, count, self.merge)
            similarity = self.model.similarity(tried, keep=[chain])
            if similarity > threshold:
                folds.append(Fold(chain[at].of, count, similarity))
                chain, left, end = tried, left - count, end - count
                at -= self.interval
                if at >= end:
                    at = end - self.merge_layers
            else:
                at -= 1
        return Collapsed(chain, tuple(folds), threshold)

    def budget(self, threshold: float, count: int) -> Collapsed:
        """Repeats algorithm 1 with falling thresholds until exactly `count` layers are merged."""
        found = Collapsed(self.model.dense)
        while found.count < count:
            found = self.sweep(threshold, count, found)
            threshold -= _LOWER
        return found

    def bisection(self, count: int) -> Collapsed:
        """Runs algorithm 1 with the highest threshold that still merges `count` layers."""
        low, high = -1.0, 1.0
        best = self.sweep(low, count)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            found = self.sweep(middle, count)
            if found.count == count:
                low, best = middle, found
            else:
                high = middle
        return best if best.count == count else self.budget(low, count)

    def segments(self, count: int) -> Collapsed:
        """Chooses disjoint runs that merge `count` layers, by measuring each run alone.

        The best sets of runs are then measured together.
        """
        dense = self.model.dense
        runs = {
            (at, size): self.model.similarity(folded(dense, at, size, self.merge))
            for size in range(1, min(self.merge_layers - 1, count) + 1)
            for at in range(self.lowest, self.highest - size)
        }
        chosen = combinations(runs, self.lowest, self.highest, count, _JOINT)
        tried = [self._joined(combination, runs) for combination in chosen]
        return max(tried, key=lambda found: self.model.similarity(found.chain))

    def _joined(self, runs: Runs, alone: dict[tuple[int, int], float]) -> Collapsed:
        chain, folds = self.model.dense, []
        for at, size in reversed(runs):  # from the top, so that places below stay
            chain = folded(chain, at, size, self.merge)
            folds.append(Fold(at, size, alone[at, size]))
        return Collapsed(chain, tuple(folds))


def combinations(
    runs: dict[tuple[int, int], float], lowest: int, highest: int, count: int, best: int
) -> list[Runs]:
    """Finds the `best` sets of disjoint runs (place, layers) that merge `count` layers in all.

    By dynamic programming over places: the sum of log similarities is highest.
    """
    ends: dict[tuple[int, int], list[tuple[float, Runs]]] = defaultdict(list)
    ends[lowest, 0] = [(0.0, ())]
    largest = max((size for _, size in runs), default=0)
    for at in range(lowest, highest):
        for done in range(count + 1):
            ways = sorted(ends.pop((at, done), []), reverse=True)[:best]
            if not ways:
                continue
            ends[at + 1, done] += ways
            for size in range(1, min(largest, count - done) + 1):
                if (at, size) in runs:
                    gain = log(max(runs[at, size], 1e-9))
                    ends[at + size + 1, done + size] += [
                        (score + gain, (*chosen, (at, size))) for score, chosen in ways
                    ]
    return [chosen for _, chosen in sorted(ends[highest, count], reverse=True)[:best]]


def most(lowest: int, highest: int, merge_layers: int, target: str) -> int:
    """The most layers that can be merged between two places."""
    span = max(0, highest - lowest)
    if target != "segments":
        return max(0, span - 1)
    whole, rest = divmod(span, merge_layers)
    return whole * (merge_layers - 1) + max(0, rest - 1)
