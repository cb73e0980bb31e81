"""Which models are beaten in quality, speed and bytes, and the one figure that shows it.

A search's candidates and the results that `compare` is given become `Point`s; `beaten_by` tells
which of them nobody need choose, `draw_pareto` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from prune_export.report import style
from prune_export.report.candidates import CandidateReading, SearchReading
from prune_export.report.panels import LOG_SPREAD, plain_log_ticks, spread
from prune_export.report.table import number
from prune_export.units import text_from_bytes

Range = tuple[float, float]
Across = Literal["speed", "bytes"]

_COLORS: Final = (
    style.HEALED, "#e69f00", "#009e73", "#cc79a7", style.PRUNED, style.ENGINE, style.DENSE,
)  # fmt: skip
_CLIMB: Final = {"speed": 1, "bytes": -1}
"""Whether more of it is better."""


@dataclass(frozen=True)
class Point:
    """A model or an engine by its perplexity, speed and bytes; None is what was not measured.

    `speed` may be over the dense engine or in tokens per second, but in one figure the same.
    `perplexity_range` and `speed_range` are 95 % intervals. `group` gives the colour, as a
    precision or a runtime; `chosen` is drawn bold.
    """

    label: str
    perplexity: float | None
    speed: float | None = None
    bytes: int | None = None
    perplexity_range: Range | None = None
    speed_range: Range | None = None
    group: str = ""
    chosen: bool = False


def beaten_by(points: Sequence[Point]) -> list[int | None]:
    """Finds for each point the best one that beats it, as an index; None where none does.

    One beats another if it is no worse in all that was measured of the two, and better in
    something by more than their intervals. What was measured of one alone decides nothing: such
    two stand side by side. What beats a point is itself beaten by none, where such is there.
    """
    found: list[list[int]] = [
        [place for place, other in enumerate(points) if beats(other, one)] for one in points
    ]
    best: list[int | None] = []
    for rivals in found:
        top = [place for place in rivals if not found[place]] or rivals
        best.append(min(top, key=lambda place: _worth(points[place]), default=None))
    return best


def beats(one: Point, other: Point) -> bool:
    """Whether nobody need choose `other` where `one` is to be had."""
    better = False
    for mine, yours, sign in (
        (_measure(one.perplexity, one.perplexity_range),
         _measure(other.perplexity, other.perplexity_range), -1),
        (_measure(one.speed, one.speed_range), _measure(other.speed, other.speed_range), 1),
        (_measure(one.bytes, None), _measure(other.bytes, None), -1),
    ):  # fmt: skip
        if mine is None and yours is None:
            continue
        if mine is None or yours is None or sign * (mine[0] - yours[0]) < 0:
            return False
        gap = mine[1] - yours[2] if sign > 0 else yours[1] - mine[2]
        better = better or gap > 0
    return better


def draw_pareto(
    axes: Axes,
    points: Sequence[Point],
    *,
    across: Across = "speed",
    across_label: str = "decoding speed over the dense engine, right is better",
    quality_label: str = "perplexity, low is better",
    title: str = "Quality over speed",
    note: str = "",
) -> list[Point]:
    """Draws perplexity over speed or bytes: filled where nothing beats a point, hollow otherwise.

    Beaten is said of all that was measured, not of the two axes alone; the line joins what nothing
    beats in those two. Areas show bytes where `across` is speed. Gives the points that it drew:
    those of which perplexity and what is `across` are finite numbers.
    """
    beaten = beaten_by(points)
    shown = [
        (one, beaten[place])
        for place, one in enumerate(points)
        if _finite(one.perplexity) and _finite(_across(one, across))
    ]
    drawn = [one for one, _ in shown]
    groups = list(dict.fromkeys(one.group for one in points))
    _scales(axes, drawn, across)
    steps = _staircase(drawn, across)
    axes.plot(
        [_across(one, across) or 0 for one in steps], [one.perplexity or 0 for one in steps],
        color=style.DENSE, linewidth=1.4, alpha=0.6, zorder=1,
    )  # fmt: skip
    for one, rival in shown:
        color = _COLORS[groups.index(one.group) % len(_COLORS)]
        _draw_point(axes, one, across, color, hollow=rival is not None, area=_area(one, drawn))
    _write_labels(axes, drawn, across)
    if len(groups) > 1:
        for place, group in enumerate(groups):
            color = _COLORS[place % len(_COLORS)]
            axes.plot([], [], "o", color=color, markersize=5, label=style.label(group or "other"))
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.01, -0.13), ncols=min(len(groups), 4),
            handletextpad=0.2, columnspacing=1.0, borderaxespad=0.2,
        )  # fmt: skip
    axes.grid(axis="both")
    axes.set_xlabel(across_label)
    axes.set_ylabel(quality_label)
    if title:
        style.title(axes, title, note)
    return drawn


def frontier(candidates: Sequence[CandidateReading]) -> list[CandidateReading]:
    """Finds the candidates that nothing beats, from the slowest to the fastest."""
    points = [point_of_candidate(one) for one in candidates]
    best = [
        one
        for one, rival in zip(candidates, beaten_by(points), strict=True)
        if rival is None
    ]  # fmt: skip
    return sorted(best, key=lambda one: (one.speedup or 0, one.perplexity or 0))


def point_of_candidate(one: CandidateReading) -> Point:
    """A search's candidate as a point; its speed is over the dense engine."""
    return Point(one.label, one.perplexity, one.speedup, chosen=one.note == "chosen")


def points_of(found: SearchReading) -> list[Point]:
    """A search's models on engines as points, of one colour an engine."""
    return [
        Point(
            one.label.removesuffix(f", {one.engine}"), one.perplexity, one.speedup, one.bytes,
            group=one.engine, chosen=one.note == "chosen",
        )
        for one in found.points
    ]  # fmt: skip


def pareto(axes: Axes, found: SearchReading) -> None:
    """Draws validation perplexity over measured speed of a search's candidates or points."""
    points = [point_of_candidate(one) for one in found.timed]
    across = "decoding speed over the dense engine, right is better"
    if found.points:
        points = points_of(found)
        across = f"decoding speed over {found.reference}, right is better; areas are bytes"
    draw_pareto(
        axes, points, across_label=across,
        quality_label="validation perplexity, low is better",
        note="filled: beaten by none · bold: chosen",
    )  # fmt: skip


def _measure(value: float | None, between: Range | None) -> tuple[float, float, float] | None:
    """A measured value with its interval; what is not a number is infinitely bad."""
    if value is None:
        return None
    known = math.inf if math.isnan(value) else float(value)
    low, high = between or (known, known)
    if math.isnan(low) or math.isnan(high):
        low = high = known
    return known, min(low, known), max(high, known)


def _worth(one: Point) -> tuple[float, float, float]:
    """For sorting: better quality first, then speed, then bytes."""
    quality = one.perplexity if _finite(one.perplexity) else None
    return (
        math.inf if quality is None else quality,
        -(one.speed or 0.0),
        math.inf if one.bytes is None else float(one.bytes),
    )


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _across(one: Point, across: Across) -> float | None:
    return one.speed if across == "speed" else one.bytes


def _staircase(points: Sequence[Point], across: Across) -> list[Point]:
    """The points that none is better than in the figure's two axes, from left to right."""
    sign = _CLIMB[across]
    found: list[Point] = []

    def best_first(one: Point) -> tuple[float, float]:
        return -sign * (_across(one, across) or 0), one.perplexity or 0

    for one in sorted(points, key=best_first):
        if not found or (one.perplexity or 0) < (found[-1].perplexity or 0):
            found.append(one)
    return sorted(found, key=lambda one: _across(one, across) or 0)


def _scales(axes: Axes, drawn: Sequence[Point], across: Across) -> None:
    heights = [one.perplexity or 0 for one in drawn]
    if spread(heights) > LOG_SPREAD:
        axes.set_yscale("log")
        plain_log_ticks(axes)
    if across == "bytes":
        if spread([float(one.bytes or 0) for one in drawn]) > LOG_SPREAD:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text_from_bytes(int(value))))
        if axes.get_xscale() == "linear":
            axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.25, y=0.18)


def _area(one: Point, drawn: Sequence[Point]) -> float:
    """The area of a marker in points²: in proportion to bytes, where all have some."""
    if not all(other.bytes for other in drawn):
        return 64.0 if one.chosen else 36.0
    largest = max(other.bytes or 0 for other in drawn)
    return max(20.0, 150.0 * (one.bytes or 0) / largest)


def _draw_point(
    axes: Axes, one: Point, across: Across, color: str, *, hollow: bool, area: float
) -> None:
    x, y = _across(one, across) or 0, one.perplexity or 0
    if across == "speed" and one.speed_range:
        axes.plot(one.speed_range, [y, y], color=color, alpha=0.45, linewidth=1.4, zorder=2)
    if one.perplexity_range:
        axes.plot([x, x], one.perplexity_range, color=color, alpha=0.45, linewidth=1.4, zorder=2)
    axes.scatter(
        [x], [y], s=area if across == "speed" else 40.0, color="white" if hollow else color,
        edgecolors=color, linewidths=1.8 if one.chosen else 1.1, zorder=3,
    )  # fmt: skip


def _write_labels(axes: Axes, drawn: Sequence[Point], across: Across) -> None:
    """Writes each label beside its point, where it covers no other label, as far as there is room.

    Sizes are estimated from the number of characters, so that no drawing is needed first.
    """
    taken: list[tuple[float, float, float, float]] = []
    axes.autoscale_view()
    per_point = style.DPI / 72
    for one in drawn:
        x, y = _across(one, across) or 0, one.perplexity or 0
        text = f"{style.label(one.label, 26)}  {number(y)}"
        at = axes.transData.transform((x, y)) / per_point
        width, height = 4.6 * len(text), 9.5
        places = [
            (dx, dy, "left" if dx > 0 else "right")
            for dy in (4, -11, 15, -22, 26, -33)
            for dx in (8, -8)
        ]
        boxes = [
            (at[0] + (dx if side == "left" else dx - width), at[1] + dy, width, height)
            for dx, dy, side in places
        ]
        free = [
            place for place, box in enumerate(boxes)
            if not any(_overlap(box, other) for other in taken)
        ]  # fmt: skip
        place = free[0] if free else 0
        taken.append(boxes[place])
        axes.annotate(
            text, (x, y), xytext=places[place][:2], textcoords="offset points",
            ha=places[place][2], fontsize=8.0, fontweight="bold" if one.chosen else "normal",
            color=style.INK if one.chosen else style.MUTED, annotation_clip=False,
        )  # fmt: skip


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> bool:
    return (
        one[0] < other[0] + other[2] and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3] and other[1] < one[1] + one[3]
    )  # fmt: skip
