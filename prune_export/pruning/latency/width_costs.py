"""The cost of each width: timed on engines of such widths, or counted in parameters.

Costs are fractions of the dense model's. What the blocks' MLPs and attentions cost is taken to add
up; the method measures what it made and corrects for what is not so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prune_export.arch import Arch
from prune_export.calibrate import Engines
from prune_export.errors import PlanError
from prune_export.pruning.latency import narrowing
from prune_export.pruning.latency.narrowing import Limits
from prune_export.recipe.search import Target

_POINTS: Final = 3
"""Widths of one axis that are timed, the whole one among them; between them lie straight lines."""

ENGINE_SECONDS: Final = 90.0
"""An engine of some widths takes about this long to build and to time; for the plan."""


@dataclass(frozen=True)
class Line:
    """Cost by size, interpolated linearly between known points and extrapolated beyond them."""

    points: tuple[tuple[int, float], ...]
    """Ascending by size; one point is the same cost at any size."""

    def at(self, size: int) -> float:
        """Interpolates the cost at a size; it never falls while the size grows."""
        if len(self.points) == 1:
            return self.points[0][1]
        pairs = list(zip(self.points, self.points[1:], strict=False))
        (x0, y0), (x1, y1) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


@dataclass(frozen=True)
class Costs:
    """The cost of a model: a constant part, and that of MLPs and attentions by their size."""

    base: float
    lines: Mapping[str, Line]

    def of(self, axis: str, size: int) -> float:
        """The cost of all blocks with an axis (`mlp`, `kv`) of a size, beyond that of size 0."""
        line = self.lines[axis]
        return line.at(size) - line.at(0)

    def whole(self, sizes: Mapping[str, int]) -> float:
        """The cost of the model with these sizes in all blocks."""
        return self.base + sum(self.of(axis, size) for axis, size in sizes.items())


def counted(arch: Arch, kinds: Sequence[Limits]) -> Costs:
    """Counts costs in parameters."""
    dense = arch.parameters()
    lines = {}
    for kind in kinds:
        points = {
            size: narrowing.uniform(arch, {kind.axis: size}).parameters() / dense
            for size in (kind.least, kind.whole)
        }
        lines[kind.axis] = _rising(points)
    return _from(lines, kinds)


def timed(arch: Arch, kinds: Sequence[Limits], target: Target, engines: Engines) -> Costs:
    """Measures costs in seconds of decoding, on engines of a few widths of each axis.

    Raises:
        PlanError: the engines of narrower models are not faster.
    """
    lines = {}
    for kind in kinds:
        points = {kind.whole: 1.0}
        for size in _spread(kind.sizes):
            sizes = narrowing.in_all(arch, {kind.axis: size})
            points[size] = 1 / speedup(engines, sizes, target)
        lines[kind.axis] = _rising(points)
    costs = _from(lines, kinds)
    if all(len(line.points) == 1 for line in lines.values()):
        raise PlanError(
            f"target  engine: {target.engine}",
            "narrower engines were not measured to be faster on this machine",
            "choose another engine or workload, or a target in parameters",
        )
    return costs


def engines(kinds: Sequence[Limits]) -> int:
    """The number of engines to time: for the lines, the dense one, and about two at the end."""
    return 3 + sum(len(_spread(kind.sizes)) for kind in kinds)


def speedup(engines: Engines, sizes: Mapping[str, int], target: Target) -> float:
    """Measures the speedup of an engine in which some axes are cut to `sizes`."""
    request = target.workload
    return engines.speedup(sizes, target.engine, (request.batch, request.prompt, request.new))


def _spread(sizes: Sequence[int]) -> list[int]:
    """Chooses some of the smaller sizes, evenly spaced."""
    whole = sizes[0]
    wanted = [whole * (_POINTS - i) / _POINTS for i in range(1, _POINTS)]
    smaller = [size for size in sizes[1:] if size]
    return sorted({min(smaller, key=lambda s: abs(s - w)) for w in wanted}) if smaller else []


def _rising(points: Mapping[int, float]) -> Line:
    """The line through measured points, without those that noise makes fall as the size grows."""
    kept: list[tuple[int, float]] = []
    for size, cost in sorted(points.items(), reverse=True):
        if not kept or cost < kept[-1][1]:
            kept.append((size, cost))
    return Line(tuple(reversed(kept)))


def _from(lines: Mapping[str, Line], kinds: Sequence[Limits]) -> Costs:
    parts = sum(lines[kind.axis].at(kind.whole) - lines[kind.axis].at(0) for kind in kinds)
    return Costs(1 - parts, lines)
