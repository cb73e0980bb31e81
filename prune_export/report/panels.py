"""Draws the panels of figures, one function each, onto given axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from prune_export.report import style
from prune_export.report.candidates import SearchReading
from prune_export.report.healing import distilled, floor
from prune_export.report.reading import Report, StageReading, as_number, runs, text_from_blocks
from prune_export.report.table import has_bound, number, speed_text, times, workload_text
from prune_export.verify.results import Speed

LOG_SPREAD = 12.0
"""Values that spread by more than this factor get a log scale, which the axis then says."""


def distance_map(axes: Axes, stage: StageReading, *, compact: bool = False) -> None:
    """Draws the angular distance across every run of blocks, start x size, with the cut ringed."""
    table = stage.log["distance_map"] or []
    layers = len(table) - 1
    values = np.full((layers, layers), np.nan)
    for start in range(layers):
        for end in range(start + 1, layers + 1):
            found = table[start][end]
            values[end - start - 1, start] = math.nan if found is None else float(found)
    shown = values[np.isfinite(values)]
    top = float(np.quantile(shown, 0.98)) if shown.size else 1.0
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5, np.arange(layers + 1) + 0.5, values,
        cmap=style.distance_colors(), vmin=float(shown.min()) if shown.size else 0.0, vmax=top,
    )  # fmt: skip
    best = [(int(np.nanargmin(row)), size) for size, row in enumerate(values, 1)
            if np.isfinite(row).any()]  # fmt: skip
    axes.scatter(
        [start for start, _ in best], [size for _, size in best], s=max(1.5, 220 / layers**1.25),
        color="white", alpha=0.75, linewidths=0, zorder=3,
    )  # fmt: skip
    cuts = [(first, last - first + 1) for first, last in runs(stage.dropped)]
    for start, size in cuts:
        axes.add_patch(Rectangle((start - 0.5, size - 0.5), 1, 1, fill=False, zorder=5,
                                 edgecolor="white", linewidth=3.4))  # fmt: skip
        axes.add_patch(Rectangle((start - 0.5, size - 0.5), 1, 1, fill=False, zorder=6,
                                 edgecolor=style.PRUNED, linewidth=1.8))  # fmt: skip
    if len(cuts) == 1:
        _point_at_cut(axes, cuts[0], values, compact=compact)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(0.5, layers + 0.5))
    axes.set_xlabel("first block of the run (0 = first)")
    axes.set_ylabel("blocks in the run")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, min_n_ticks=1))
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=28, extend="max", fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7.5)
    if not compact:
        bar.set_label("angular distance (fraction of π)", color=style.MUTED)
    note = "dots: the closest pair for each size"
    if not compact:
        note = "How far the residual stream turns across a run of blocks; low = redundant.\n"
        note += "White dots: the best place for each size."
        note += " Ring: the cut that was made." if cuts else ""
    style.title(axes, "Angular distance", note)


def _point_at_cut(axes: Axes, cut: tuple[int, int], values: np.ndarray, *, compact: bool) -> None:
    layers, (start, size) = len(values), cut
    found = values[size - 1, start] if start + size <= layers else math.nan
    words = f"removed: {_blocks(range(start, start + size))}"
    words += f"\ndistance {found:.3f}" if math.isfinite(found) else ""
    # The corner above the diagonal is empty; the text goes as low in it as its width allows.
    bottom = layers * (0.66 if compact else 0.42)
    axes.annotate(
        words, (start + 0.45, size + 0.45), xytext=(layers - 0.8, bottom), textcoords="data",
        ha="right", va="bottom", fontsize=8.5, fontweight="bold", color=style.PRUNED,
        arrowprops={"arrowstyle": "-", "color": style.PRUNED, "linewidth": 1.2, "relpos": (0.6, 0),
                    "shrinkA": 2, "shrinkB": 1},
    )  # fmt: skip


def block_scores(axes: Axes, stage: StageReading, *, compact: bool = False) -> None:
    """Draws one stem a block, the removed ones coloured."""
    scores = [math.nan if one is None else float(one) for one in stage.log["block_scores"] or ()]
    name = str(stage.log.get("block_score_name") or "score")
    gone = set(stage.dropped)
    finite = [score for score in scores if math.isfinite(score)]
    log = spread(finite) > LOG_SPREAD
    floor = (min(finite) / 1.6 if log else min(0.0, *finite)) if finite else 0.0
    for block, score in enumerate(scores):
        color = style.PRUNED if block in gone else style.DENSE
        if math.isfinite(score):
            axes.plot([block, block], [floor, score], color=color, linewidth=_stem(len(scores)),
                      solid_capstyle="butt")  # fmt: skip
            axes.plot([block], [score], "o", color=color, markersize=min(6.0, 150 / len(scores)))
        else:
            axes.plot([block], [floor], "x", color=color, markersize=5, clip_on=False)
    if log:
        axes.set_yscale("log")
        plain_log_ticks(axes)
    if finite:
        high = max(finite)
        axes.set_ylim(floor, high * 1.6 if log else high + 0.12 * ((high - floor) or 1.0))
    axes.set_xlim(-0.7, len(scores) - 0.3)
    axes.set_xlabel("block (0 = first)")
    said = style.label(name, 72) + (" (log scale)" if log else "")
    axes.set_ylabel("\n".join(textwrap.wrap(said, 40)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.grid(axis="y")
    if gone and not compact:
        axes.plot([], [], "o", color=style.DENSE, label="kept")
        axes.plot([], [], "o", color=style.PRUNED, label=f"removed: {_blocks(gone, 26)}")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, handletextpad=0.2,
                    columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
    style.title(axes, "Score of each block", f"orange: removed {_blocks(gone)}" if compact else "")


def loss_curve(axes: Axes, stage: StageReading) -> None:
    """Draws the healing loss: every logged step faint, a centred running mean strong."""
    points = [(step, loss) for step, loss, _ in stage.losses if math.isfinite(loss)]
    broken = len(stage.losses) - len(points)
    steps = np.array([step for step, _ in points], dtype=float)
    losses = np.array([loss for _, loss in points], dtype=float)
    if len(points) == 1:
        axes.plot(steps, losses, "o", color=style.HEALED)
    elif points:
        axes.plot(steps, losses, color=style.HEALED, alpha=0.28, linewidth=1.0)
        smooth = running_mean(losses, max(1, len(losses) // 20))
        axes.plot(steps, smooth, color=style.HEALED, linewidth=2.2, solid_capstyle="round")
        for place, side in ((0, "left"), (-1, "right")):
            axes.annotate(
                f"{smooth[place]:.2f}", (steps[place], smooth[place]), xytext=(0, 9),
                textcoords="offset points", ha=side, fontsize=8.5, fontweight="bold",
                color=style.HEALED,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.2},
            )  # fmt: skip
    least = floor(stage)
    if least is not None and points:
        axes.axhline(least, color=style.DENSE, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"the teacher itself: {least:.2f}", (1.0, least), xytext=(-4, 3), ha="right",
            xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8.5,
            color=style.DENSE,
        )  # fmt: skip
    axes.set_xlabel("training step")
    axes.set_ylabel(f"{'loss' if distilled(stage) is None else 'divergence'} (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.margins(x=0.01, y=0.12)
    axes.grid(axis="y")
    count = len(stage.losses)
    note = f"{count} logged steps; line: running mean" if count > 1 else "one logged step"
    note += f"; {broken} losses were not numbers" if broken else ""
    style.title(axes, f"Healing with {style.label(stage.name)}{stage.round_text}", note)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Computes the mean over `reach` neighbours on each side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def quality(axes: Axes, report: Report, *, compact: bool = False) -> None:
    """Draws the perplexity of each measured model, dense first, values written out."""
    names = [("dense", style.DENSE), ("pruned", style.PRUNED), ("healed", style.HEALED)]
    names += [(entry.name, style.ENGINE) for entry in report.engine_perplexities]
    bars = [(name, found.value, color) for name, color in names
            if (found := report.perplexity(name)) is not None]  # fmt: skip
    finite = [value for _, value, _ in bars if math.isfinite(value) and value > 0]
    log = spread(finite) > LOG_SPREAD
    floor = min(finite) / 1.5 if log else 0.0
    reach = max(finite, default=1.0)
    dense = report.perplexity("dense")
    if dense is not None and math.isfinite(dense.value):
        axes.axvline(dense.value, color=style.DENSE, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    for place, (_, value, color) in enumerate(bars):
        if math.isfinite(value) and value > 0:
            axes.barh(place, value - floor, left=floor, height=0.62, color=color)
        axes.annotate(
            f" {number(value)}", (value if math.isfinite(value) else floor, place), va="center",
            fontsize=9.0, fontweight="bold", color=style.INK if math.isfinite(value) else style.BAD,
            annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [style.label(name, 16) for name, _, _ in bars])
    axes.tick_params(axis="y", length=0, labelsize=9.0, labelcolor=style.INK)
    axes.invert_yaxis()
    axes.set_ylim(len(bars) - 0.45, -0.55)
    if log:
        axes.set_xscale("log")
        plain_log_ticks(axes, horizontal=True)
    axes.set_xlim(floor, reach * (reach / floor) ** 0.3 if log else reach * 1.22)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("perplexity, lower is better" + (" (log scale)" if log else ""))
    first = next((found for name, _, _ in bars if (found := report.perplexity(name))), None)
    note = f"{first.windows} windows of {first.length} tokens" if first and not compact else ""
    note += f",\n{report.protocol}" if note and report.protocol else ""
    style.title(axes, "Quality", note or "perplexity on held-out text")


def speed(axes: Axes, report: Report, *, compact: bool = False) -> None:
    """Draws each engine's speed against the dense one, with 95 % interval, A/A band and bound."""
    speeds = report.verification.speed if report.verification else []
    many = len({one.workload for one in speeds}) > 1
    colors = {"faster": style.GOOD, "slower": style.BAD, "no speedup": style.NEUTRAL}
    for place, one in enumerate(speeds):
        if math.isfinite(one.floor_low) and math.isfinite(one.floor_high):
            axes.add_patch(Rectangle((one.floor_low, place - 0.36), one.floor_high - one.floor_low,
                                     0.72, color=style.RULE, alpha=0.7, linewidth=0))  # fmt: skip
        if has_bound(one):
            axes.plot([one.bound, one.bound], [place - 0.3, place + 0.3], color=style.INK,
                      linewidth=1.4, linestyle=(0, (1.5, 1.2)))  # fmt: skip
        color = colors[one.verdict]
        if math.isfinite(one.ratio):
            axes.plot([one.low, one.high], [place, place], color=color, linewidth=7.0, alpha=0.35,
                      solid_capstyle="butt")  # fmt: skip
            axes.plot([one.ratio], [place], "o", color=color, markersize=5.2,
                      markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
    low, high = _speed_limits(speeds)
    axes.axvline(1.0, color=style.INK, linewidth=1.1, zorder=1)
    right = high + (high - low) * 0.04
    for place, one in enumerate(speeds):
        axes.annotate(
            _verdict_words(one, compact=compact), (right, place), xytext=(0, -1),
            textcoords="offset points", va="center", fontsize=8.5, fontweight="bold",
            color=colors[one.verdict], annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(low, high + (high - low) * (0.62 if compact else 0.66))
    axes.set_yticks(range(len(speeds)), [_speed_label(one, many) for one in speeds])
    axes.tick_params(axis="y", length=0, labelsize=9.0, labelcolor=style.INK)
    axes.set_ylim(len(speeds) - 0.45, -0.55)
    axes.spines["left"].set_visible(False)
    ticks = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5]).tick_values(low, high)
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(axis="x")
    axes.set_xlabel("times as fast as dense, right is better", loc="left")
    load = f"{workload_text(speeds[0])} tokens" if speeds and not many else ""
    note = "bar: 95 % · grey: A/A noise · dotted: bytes bound"
    if not compact:
        note = "Bar: 95 % interval. Grey: what dense against dense showed (A/A).\n" + (
            "Dotted: what fewer weight bytes allow in decode." + (f" {load}." if load else "")
        )
    style.title(axes, "Speed", note)


def search(axes: Axes, found: SearchReading) -> None:
    """Draws each candidate's validation perplexity, pruned and briefly healed; the best on top."""
    shown = [one for one in found.candidates if one.pruned is not None]
    values = [one for row in shown for one in (row.pruned, row.healed) if one is not None]
    log = spread(values) > LOG_SPREAD
    for place, one in enumerate(shown):
        color = style.HEALED if place == 0 else style.DENSE
        pruned, healed = as_number(one.pruned), as_number(one.healed)
        if math.isfinite(healed):
            axes.plot([pruned, healed], [place, place], color=color, linewidth=2.0, alpha=0.5)
            axes.plot([healed], [place], "o", color=color, markersize=7)
        axes.plot([pruned], [place], "o", color="white", markersize=6, markeredgecolor=color)
        size = f"{one.speedup:.2f}×" if one.speedup is not None else ""
        if not size and one.parameters_left is not None:
            size = f"{one.parameters_left:.1%}"
        best = healed if math.isfinite(healed) else pruned
        axes.annotate(
            f"{number(best)}  {size}", (best, place), xytext=(0, 8), textcoords="offset points",
            ha="center", fontsize=8.5, fontweight="bold", color=color, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [style.label(one.label, 30) for one in shown])
    axes.tick_params(axis="y", length=0, labelsize=9.0, labelcolor=style.INK)
    axes.set_ylim(len(shown) - 0.45, -0.75)
    if log:
        axes.set_xscale("log")
        plain_log_ticks(axes, horizontal=True)
    axes.margins(x=0.12)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_xlabel("validation perplexity, left is better" + (" (log scale)" if log else ""))
    style.title(axes, f"Search: {found.goal}", "open: pruned · filled: after the short heal")


def _verdict_words(one: Speed, *, compact: bool) -> str:
    if not compact:
        return speed_text(one)
    if one.verdict == "no speedup":
        return "no speedup"
    return f"{times(one.ratio)} {one.verdict}"


def _speed_label(one: Speed, many: bool) -> str:
    load = one.workload
    size = f"\n{load.batch}×{load.prompt}+{load.new}" if many else ""
    return f"{style.label(one.engine, 14)} {one.phase}{size}"


def _speed_limits(speeds: Sequence[Speed]) -> tuple[float, float]:
    ends = [1.0]
    for one in speeds:
        ends += [one.low, one.high, one.ratio, one.floor_low, one.floor_high]
        ends += [one.bound] if has_bound(one) else []
    ends = [end for end in ends if math.isfinite(end)]
    margin = 0.08 * (max(ends) - min(ends)) or 0.1
    return min(ends) - margin, max(ends) + margin


def _blocks(blocks: object, most: int = 34) -> str:
    found = list(blocks)  # type: ignore[call-overload]
    word = "block" if len(found) == 1 else "blocks"
    text = text_from_blocks(found)
    return f"{word} {text}" if len(text) <= most else f"{len(found)} {word}"


def spread(values: Sequence[float]) -> float:
    """The factor between the largest and the smallest; 1 unless all of them are positive."""
    positive = [value for value in values if value > 0]
    return max(positive) / min(positive) if positive and len(positive) == len(values) else 1.0


def _stem(count: int) -> float:
    return min(2.4, 90 / count)


def plain_log_ticks(axes: Axes, *, horizontal: bool = False) -> None:
    """Writes the ticks of a log axis as plain numbers."""
    axis = axes.xaxis if horizontal else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    return f"{value:,g}" if value < 1e6 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
