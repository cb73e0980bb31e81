"""Searches the widths with which a model meets a speed or size target at the least loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prune_export.calibrate import ModelView
from prune_export.errors import PlanError, StageError
from prune_export.pruning.latency import narrowing, spdy, width_costs
from prune_export.pruning.latency.narrowing import Limits
from prune_export.pruning.latency.width_costs import Costs
from prune_export.recipe.search import Target

Kinds = tuple[Limits, Limits]

_ROUNDS: Final = 5
"""Engines of the chosen widths that are measured, at most, until one is as fast as asked."""


@dataclass(frozen=True)
class Found:
    """The chosen sizes of each block's cut axes, and how they were found."""

    sizes: Mapping[str, int]
    log: Mapping[str, Any]


def budget_of(target: Target) -> float:
    """The share of the dense model's cost that a target allows."""
    return target.parameters or 1 / (target.speedup or 1)


def affordable(kinds: Kinds, costs: Costs, budget: float) -> list[dict[str, int]]:
    """Finds, for each number of KV groups, the most FFN channels within the budget.

    Raises:
        PlanError: there are none.
    """
    ffn, kv = kinds
    found = []
    for groups in kv.sizes:
        for width in range(ffn.whole // ffn.step * ffn.step, 0, -ffn.step):
            sizes = {"mlp": width, "kv": groups}
            if costs.whole(sizes) <= budget:
                found.append(sizes)
                break
    if not found:
        least = costs.whole({kind.axis: kind.least for kind in kinds})
        raise PlanError(
            "target",
            f"asks for {budget:.0%} of the dense cost, but narrow MLPs and attentions "
            f"leave at least {least:.0%}",
            "ask for less, or remove blocks as well",
        )
    return found


def meet(model: ModelView, kinds: Kinds, target: Target, *, uniform: bool, tries: int) -> Found:
    """Searches widths that meet the target; where it is a speed, engines are measured.

    Raises:
        PlanError: no widths can meet it.
        StageError: those that should were not measured to do so.
    """
    search = _Search(model, kinds, target, tries)
    return search.meet(_Alike(search) if uniform else _Apart(search))


class _Losses:
    """Measures the loss of narrowed models, and keeps it for a run that was killed."""

    def __init__(self, model: ModelView) -> None:
        self._model = model
        scratch = model.calibration().scratch
        self._file = scratch / "losses.json" if scratch else None
        self._known: dict[str, float] = {}
        if self._file and self._file.exists():
            self._known = json.loads(self._file.read_text(encoding="utf-8"))

    def of(self, sizes: Mapping[str, int]) -> float:
        """The mean next-token loss in nats over the calibration windows."""
        editor = narrowing.Narrower(self._model.arch, sizes)
        if editor.key not in self._known:
            result = self._model.sequential(editor, loss=True)
            assert result.loss is not None
            self._known[editor.key] = result.loss
            if self._file:
                partial = self._file.with_suffix(".partial")
                partial.write_text(json.dumps(self._known), encoding="utf-8")
                partial.replace(self._file)
                # Matrices of what may lose: the winner's are made again.
                shutil.rmtree(result.folder)
        return self._known[editor.key]


class _Search:
    def __init__(self, model: ModelView, kinds: Kinds, target: Target, tries: int) -> None:
        self.model, self.kinds, self.target, self.tries = model, kinds, target, tries
        self.engines = model.calibration().engines
        self.log: dict[str, Any] = {}
        if target.parameters is not None:
            self.costs = width_costs.counted(model.arch, kinds)
        elif self.engines is None:
            raise ValueError("the view has no engines to time: `run` gives them")
        else:
            self.costs = width_costs.timed(model.arch, kinds, target, self.engines)
        self.log["costs"] = {
            "base": self.costs.base,
            **{axis: [*map(list, line.points)] for axis, line in self.costs.lines.items()},
        }
        self.losses = _Losses(model)

    def left(self, sizes: Mapping[str, int]) -> float:
        """The share of the cost that is left: of an engine that is timed, or in parameters."""
        if self.engines is not None and self.target.speedup is not None:
            return 1 / width_costs.speedup(self.engines, sizes, self.target)
        layers = self.model.arch.layers
        cut = {kind.axis: kind.whole for kind in self.kinds}
        parts = (
            self.costs.of(axis, sizes.get(f"{axis}.{layer}", whole)) / layers
            for axis, whole in cut.items()
            for layer in range(layers)
        )
        return self.costs.base + sum(parts)

    def meet(self, choose: Callable[[float], dict[str, int]]) -> Found:
        """Corrects the budget until the chosen widths are measured to meet the target."""
        wanted = budget_of(self.target)
        budget = wanted
        rounds: list[dict[str, Any]] = []
        best: tuple[float, dict[str, int]] | None = None
        for _ in range(_ROUNDS):
            try:
                sizes = choose(budget)
            except PlanError:
                if rounds:
                    break
                raise
            if rounds and sizes == rounds[-1]["sizes"]:
                break
            left = self.left(sizes)
            rounds.append({"budget": budget, "left": left, "sizes": sizes})
            off = abs(wanted / left - 1)
            if best is None or off < best[0]:
                best = off, sizes
            if off <= self.target.tolerance / 2 or self.target.parameters is not None:
                break
            budget *= wanted / left
        assert best is not None
        if best[0] > self.target.tolerance:
            raise StageError(
                "ziplm",
                f"comes only within {best[0]:.1%} of the target: "
                + "; ".join(f"{1 / one['left']:.2f}x" for one in rounds),
                "write a wider `tolerance`, a smaller `multiple_of`, or another target",
            )
        return Found(best[1], self.log | {"rounds": rounds})


class _Alike:
    """The same widths in all blocks: the number of KV groups by loss, FFN channels by budget."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._groups: int | None = None

    def __call__(self, budget: float) -> dict[str, int]:
        search = self._search
        able = affordable(search.kinds, search.costs, budget)
        if self._groups is None:
            able = _some(able, search.tries)
            losses = [
                search.losses.of(narrowing.in_all(search.model.arch, sizes)) for sizes in able
            ]
            search.log["tried"] = [[sizes, loss] for sizes, loss in zip(able, losses, strict=True)]
            self._groups = able[losses.index(min(losses))]["kv"]
        wanted = self._groups
        sizes = min(able, key=lambda sizes: abs(sizes["kv"] - wanted))
        return narrowing.in_all(search.model.arch, sizes)


class _Apart:
    """Widths of its own for each block, by SPDY's dynamic programming."""

    def __init__(self, search: _Search) -> None:
        self._search = search
        self._weights: tuple[float, ...] | None = None
        arch = search.model.arch
        levels = {kind.axis: kind.sizes for kind in search.kinds}
        logs = search.model.sequential(narrowing.Scorer(arch, levels)).logs
        self._axes: list[tuple[str, int]] = []
        self._parts: list[spdy.Levels] = []
        for layer in range(arch.layers):
            for axis, sizes in levels.items():
                if len(sizes) > 1:
                    errors = tuple(logs[layer][narrowing.KIND_OF[axis]]["errors"])
                    times = tuple(search.costs.of(axis, size) / arch.layers for size in sizes)
                    self._axes.append((axis, layer))
                    self._parts.append(spdy.Levels(errors, times))
        self._sizes = levels

    def __call__(self, budget: float) -> dict[str, int]:
        search = self._search
        room = budget - search.costs.base
        if self._weights is None:
            found = spdy.search(
                self._parts,
                room,
                lambda levels: search.losses.of(self._widths(levels)),
                tries=search.tries,
            )
            search.log["tried"] = list(found.tried)
            self._weights = found.weights
            return self._widths(found.levels)
        return self._widths(spdy.cheapest(self._parts, self._weights, room))

    def _widths(self, levels: Sequence[int]) -> dict[str, int]:
        found = {}
        for (axis, layer), level in zip(self._axes, levels, strict=True):
            if level:
                found[f"{axis}.{layer}"] = self._sizes[axis][level]
        return found


def _some(found: list[dict[str, int]], count: int) -> list[dict[str, int]]:
    """Picks at most `count` of them, evenly spaced, the first included."""
    if len(found) <= count:
        return found
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]
