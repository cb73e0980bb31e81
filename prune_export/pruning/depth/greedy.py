"""Greedy search for the units to remove by measured loss, with few forward passes.

What a unit's removal costs changes slowly while others are removed, so each step measures only the
units whose last known costs are the least. These race: all of them on a few windows, the better
half on twice as many, and so on, until the last ones are compared on all windows.

The best set of six need not contain the best set of five. So after each removal those before it are
revised: where the model is better with an earlier unit put back than any model of that size was so
far, the search goes on from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from prune_export.calibrate import Ablations, Unit
from prune_export.calibrate.passes.ablation import Removed

_GAIN: Final = 2e-3
"""Nats by which a revised model must be better: what is less may be chance, and costs as much."""


@dataclass(frozen=True)
class Found:
    """The units to remove, in order of removal, and how they were found.

    `best` has, for each number of removed units, the loss of the best model and its units.
    """

    order: Removed
    best: tuple[tuple[float, Removed], ...]
    first_costs: Mapping[Unit, float]
    steps: tuple[Mapping[str, Any], ...]


def greedy(
    ablations: Ablations,
    units: Collection[Unit],
    count: int,
    *,
    shortlist: int,
    beam: int = 1,
    revise: bool = True,
    guess: Mapping[Unit, float] | None = None,
) -> Found:
    """Chooses `count` of `units`, each time the one whose removal raises the loss least.

    `shortlist` units race for each removal; for the first, all do, or with a `guess` (a score by
    which costs are expected to rank) those with the least. With `revise`, earlier ones are
    put back where that is better; with a `beam`, so many of the best sets are followed instead. Of
    equal losses the deeper unit goes.

    Source: the revision is the floating search of Pudil et al., "Floating search methods in
    feature selection", Pattern Recognition Letters 15 (1994).
    """
    search = _Search(ablations, tuple(units), shortlist, guess or {})
    best = search.floating(count) if revise and beam == 1 else search.beam(count, beam)
    return Found(
        best[-1].gone,
        tuple((model.loss, model.gone) for model in best),
        search.first,
        tuple(search.steps),
    )


@dataclass(frozen=True)
class _Model:
    """A pruned model: its loss, the removed units in order, and every unit's last known cost."""

    gone: Removed
    loss: float
    costs: Mapping[Unit, float]


@dataclass
class _Search:
    ablations: Ablations
    units: tuple[Unit, ...]
    shortlist: int
    guess: Mapping[Unit, float]
    first: dict[Unit, float] = field(default_factory=dict)
    steps: list[Mapping[str, Any]] = field(default_factory=list)

    def beam(self, count: int, width: int) -> list[_Model]:
        """Finds the best model of each size by beam search of this width."""
        ways = [self._dense()]
        best = ways[:]
        for _ in range(count):
            ways = self._removed(ways, width)
            best.append(ways[0])
        return best

    def floating(self, count: int) -> list[_Model]:
        """Finds the best model of each size by floating search: earlier removals may be undone."""
        at = self._dense()
        best = [at]
        while len(at.gone) < count:
            (at,) = self._removed([at], 1)
            size = len(at.gone)
            if size == len(best):
                best.append(at)
            elif at.loss < best[size].loss - _GAIN:
                best[size] = at
            else:
                at = replace(best[size], costs=at.costs)
            while size > 2:
                revised, size = self._restored(at), size - 1
                if revised.loss >= best[size].loss - _GAIN:
                    break
                (back,) = set(at.gone) - set(revised.gone)
                at = best[size] = revised
                self._log("restored", at, back.layer)
        return best

    def _dense(self) -> _Model:
        (loss,) = self.ablations.losses([()], keep=[()])
        return _Model((), loss, {unit: self.guess.get(unit, 0.0) for unit in self.units})

    def _removed(self, ways: Sequence[_Model], width: int) -> list[_Model]:
        """Removes one more unit from each of `ways`; gives the best `width` models."""
        racers: dict[frozenset[Unit], _Model] = {}
        for way in ways:
            left = [unit for unit in self.units if unit not in way.gone]
            left.sort(key=lambda unit: (way.costs[unit], -unit.layer))
            for unit in left[: self.shortlist if self.first or self.guess else None]:
                racers.setdefault(frozenset((*way.gone, unit)), way)
        found: list[_Model] = []
        known = {way.gone: dict(way.costs) for way in ways}
        race = self._race(racers, keep=[way.gone for way in ways], least=width + 1)
        for gone, (loss, chunks) in race.items():
            way = racers[gone]
            (before,) = self.ablations.losses([way.gone], chunks=chunks, keep=known)
            (unit,) = gone - set(way.gone)
            known[way.gone][unit] = loss - before
            if chunks == self.ablations.chunks:
                found.append(_Model((*way.gone, unit), loss, known[way.gone]))
        if not self.first:
            self.first = self._scaled(race, known[ways[0].gone])
        found.sort(key=_rank)
        best = found[0]
        more: dict[str, Any] = {"increase": best.costs[best.gone[-1]], "measured": len(racers)}
        if len(found) > 1:
            more |= {"runner_up": found[1].gone[-1].layer, "margin": found[1].loss - best.loss}
        self._log("removed", best, best.gone[-1].layer, **more)
        return found[:width]

    def _scaled(
        self, race: Collection[frozenset[Unit]], costs: dict[Unit, float]
    ) -> dict[Unit, float]:
        """The first costs; guesses that were not measured are scaled to the measured costs."""
        measured = {unit for gone in race for unit in gone}
        share = sum(self.guess.get(unit, 0.0) for unit in measured)
        scale = abs(sum(costs[unit] for unit in measured)) / share if share else 0.0
        for unit in costs.keys() - measured:
            costs[unit] *= scale
        return {unit: costs[unit] for unit in self.units if unit in measured}

    def _restored(self, model: _Model) -> _Model:
        """Puts one removed unit back, the best of the costliest ones but not the last removed."""
        dearest = sorted(model.gone[:-1], key=lambda unit: -model.costs[unit])[: self.shortlist]
        racers = {
            frozenset(model.gone) - {unit}: tuple(one for one in model.gone if one != unit)
            for unit in dearest
        }
        race = self._race(racers, keep=[model.gone], least=2)
        ends = [
            _Model(racers[gone], loss, model.costs)
            for gone, (loss, chunks) in race.items()
            if chunks == self.ablations.chunks
        ]
        return min(ends, key=_rank)

    def _race(
        self, models: Collection[frozenset[Unit]], *, keep: Collection[Removed], least: int
    ) -> dict[frozenset[Unit], tuple[float, int]]:
        """Measures models by successive halving: each loss, and on how many chunks of the data.

        At least `least` of them are measured on all chunks.
        """
        left, chunks = list(models), 1
        found: dict[frozenset[Unit], tuple[float, int]] = {}
        while True:
            losses = self.ablations.losses(left, chunks=chunks, keep=keep)
            found |= {gone: (loss, chunks) for gone, loss in zip(left, losses, strict=True)}
            if chunks >= self.ablations.chunks:
                return found
            chunks = min(2 * chunks, self.ablations.chunks)
            left.sort(key=lambda gone: _place(found[gone][0], gone))
            left = left[: max(-(-len(left) // 2), least)]

    def _log(self, what: str, model: _Model, layer: int, **more: Any) -> None:
        gone = sorted(unit.layer for unit in model.gone)
        self.steps.append({what: layer, "loss": model.loss, **more, "gone": gone})


def _rank(model: _Model) -> tuple[float, list[int]]:
    return _place(model.loss, model.gone)


def _place(loss: float, gone: Collection[Unit]) -> tuple[float, list[int]]:
    """The sort key of a model: its loss; of equal ones, that without the deeper units is first."""
    return loss, sorted(-unit.layer for unit in gone)
