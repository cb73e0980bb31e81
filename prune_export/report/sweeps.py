"""Draws speed over a grid of workloads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from prune_export.report import style
from prune_export.report.sparse import lines_of
from prune_export.verify.results import Speed

_LINES: Final = {"prefill": "-", "decode": (0, (2, 1.5))}
_COLORS: Final = (style.HEALED, style.PRUNED, style.ENGINE, style.DENSE)


def sweep(axes: Axes, title: str, speeds: Sequence[Speed]) -> None:
    """Draws speed over prompt length, a line for each batch and phase; hollow: no difference."""
    batches = sorted({one.workload.batch for one in speeds})
    axes.set_xscale("log", base=2)
    axes.axhline(1.0, color=style.INK, linewidth=1.1, zorder=1)
    for (batch, phase), line in lines_of(speeds):
        color = _COLORS[batches.index(batch) % len(_COLORS)]
        shown = [one for one in line if math.isfinite(one.ratio)]
        at = [one.workload.prompt for one in shown]
        axes.fill_between(
            at, [one.low for one in shown], [one.high for one in shown], color=color, alpha=0.14,
            linewidth=0,
        )  # fmt: skip
        label = f"{phase}{f', batch {batch}' if len(batches) > 1 else ''}"
        axes.plot(at, [one.ratio for one in shown], color=color, linewidth=1.8, label=label,
                  linestyle=_LINES[phase])  # fmt: skip
        for one in shown:
            claimed = one.verdict != "no speedup"
            axes.plot(
                [one.workload.prompt], [one.ratio], "o", markersize=5.5, markeredgecolor=color,
                color=color if claimed else "white", zorder=3,
            )  # fmt: skip
    prompts = sorted({one.workload.prompt for one in speeds})
    axes.xaxis.set_major_locator(FixedLocator(prompts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.margins(x=0.03, y=0.12)
    axes.grid(axis="y")
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("times as fast")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2,
                columnspacing=1.2)  # fmt: skip
    style.title(axes, "Where it pays", f"{title}; band: 95 %; hollow: no claim")
