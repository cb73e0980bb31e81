"""Draws a search's candidates by decode speed and perplexity."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes

from prune_export.report import style
from prune_export.report.reading import CandidateReading, SearchReading
from prune_export.report.table import number


def frontier(candidates: Sequence[CandidateReading]) -> list[CandidateReading]:
    """Finds the Pareto frontier of speed and perplexity, from the slowest to the fastest."""
    found: list[CandidateReading] = []
    for one in sorted(candidates, key=_fastest_first):
        if not found or (one.perplexity or 0) < (found[-1].perplexity or 0):
            found.append(one)
    return found[::-1]


def pareto(axes: Axes, found: SearchReading) -> None:
    """Draws validation perplexity over measured speed, and the Pareto frontier."""
    best = frontier(found.timed)
    axes.plot(
        [one.speedup or 0 for one in best], [one.perplexity or 0 for one in best],
        color=style.DENSE, linewidth=1.4, alpha=0.6,
    )  # fmt: skip
    for one in found.timed:
        chosen, beaten = one.note == "chosen", one not in best
        color = style.HEALED if chosen else style.DENSE
        axes.plot(
            [one.speedup or 0], [one.perplexity or 0], "o", markersize=8 if chosen else 6,
            color="white" if beaten else color, markeredgecolor=color,
        )  # fmt: skip
        axes.annotate(
            f"{style.label(one.label, 26)}  {number(one.perplexity or 0)}",
            (one.speedup or 0, one.perplexity or 0), xytext=(7, 4), textcoords="offset points",
            fontsize=8.0, fontweight="bold" if chosen else "normal", color=color,
            annotation_clip=False,
        )  # fmt: skip
    axes.margins(x=0.25, y=0.18)
    axes.grid(axis="both")
    axes.set_xlabel("decoding speed over the dense engine, right is better")
    axes.set_ylabel("validation perplexity, low is better")
    style.title(axes, "Quality over speed", "filled: beaten by none in both · blue: chosen")


def _fastest_first(one: CandidateReading) -> tuple[float, float]:
    return -(one.speedup or 0), one.perplexity or 0
