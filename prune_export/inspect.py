"""Measures and draws how redundant a model's blocks are, before anything is removed.

`inspect_model` measures, in one streamed pass, the angular distance across every run of blocks and
the influence of each block; `draw` makes one picture of both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    CalibrationContext,
    TokenSet,
    gather,
)
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.numeric.scores import least, runs
from prune_export.progress import Progress
from prune_export.report import style

SOURCE: Final = "prune-export inspect"
"""What a picture says of where it comes from; nothing but such a picture is written over."""

_SHARES: Final = (0.2, 0.4)
"""The fractions of the blocks whose best run the picture names."""


@dataclass(frozen=True)
class Run:
    """The least run of `remove` blocks: its first block, the angular distance across it in units
    of pi, and how much further the next best run of that size is (None where there is no other).
    """

    remove: int
    first: int
    distance: float
    runner_up: int | None
    margin: float | None


@dataclass(frozen=True)
class Inspection:
    """The measurements of `inspect_model`.

    `distance_map` is `[layers + 1][layers + 1]`, in units of pi; `block_influence` is `[layers]`,
    1 - the mean cosine; `best_runs` has one entry a size, from 1 block to all but one.
    """

    model: str
    layers: int
    samples: int
    length: int
    fingerprint: str
    distance_map: list[list[float]]
    block_influence: list[float]
    best_runs: list[Run]

    def to_json(self) -> dict[str, Any]:
        """The inspection as plain data."""
        return dataclasses.asdict(self)


def inspect_model(
    checkpoint: Checkpoint,
    tokens: TokenSet,
    machine: Machine,
    progress: Progress | None = None,
    *,
    scratch: Path | None = None,
    name: str | None = None,
    ignore_keys: Collection[str] = (),
) -> Inspection:
    """Measures a model's angular distances and block influences over `tokens`.

    Raises:
        UnsupportedArch: no table describes the model.
        PlanError: the windows do not suit it.
    """
    arch = checkpoint.arch(ignore_keys)
    wanted = (AngularDistance(), BlockInfluence())
    context = CalibrationContext(tokens, machine, scratch, progress)
    found = gather(checkpoint, wanted, context, arch=arch)
    distances = found[wanted[0]]
    return Inspection(
        model=name or checkpoint.path.name,
        layers=arch.layers,
        samples=tokens.samples,
        length=tokens.length,
        fingerprint=tokens.fingerprint,
        distance_map=distances.tolist(),
        block_influence=found[wanted[1]].tolist(),
        best_runs=[_best(runs(distances, remove), remove) for remove in range(1, arch.layers)],
    )


def _best(scores: list[float], remove: int) -> Run:
    order = least(scores)
    second = order[1] if len(order) > 1 else None
    margin = None if second is None else scores[second] - scores[order[0]]
    return Run(remove, order[0], scores[order[0]], second, margin)


def draw(inspection: Inspection, out_png: Path) -> None:
    """Writes one PNG: the map of distances above, the blocks' influence below."""
    with style.styled():
        figure = style.new_figure(7.2, 8.4)
        above, below = figure.subplots(2, 1, height_ratios=(2.1, 1.0))
        figure.suptitle(
            f"{style.label(inspection.model, 60)}: {inspection.layers} blocks, "
            f"{inspection.samples} × {inspection.length} tokens",
            x=0.01, ha="left", fontsize=11.0, color=style.INK,
        )  # fmt: skip
        _draw_map(above, inspection)
        _draw_influence(below, inspection)
        style.save(figure, out_png, SOURCE)


def _draw_map(axes: Axes, inspection: Inspection) -> None:
    layers = inspection.layers
    values = np.full((layers, layers), math.nan)
    for first in range(layers):
        for last in range(first + 1, layers + 1):
            values[last - first - 1, first] = inspection.distance_map[first][last]
    finite = values[np.isfinite(values)]
    # Runs that hold the first or the last block turn the state so far that they would take all of
    # the scale; it ends where the runs between them do.
    inner = values[:, 1:][np.isfinite(values[:, 1:])]
    top = float(np.quantile(inner if inner.size else finite, 0.98))
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5, np.arange(layers + 1) + 0.5, values,
        cmap=style.distance_colors(), vmin=float(finite.min()), vmax=top,
    )  # fmt: skip
    best = inspection.best_runs
    axes.plot(
        [run.first for run in best], [run.remove for run in best], "o", color="white",
        markersize=max(2.2, min(4.5, 110 / layers)), markeredgecolor=style.INK,
        markeredgewidth=0.6, zorder=3,
    )  # fmt: skip
    for place, share in enumerate(_SHARES):
        _mark(axes, inspection, max(1, round(share * layers)), place)
    axes.set(xlim=(-0.5, layers - 0.5), ylim=(0.5, layers + 0.5))
    axes.set_xlabel("first block of the run (0 = first)")
    axes.set_ylabel("blocks in the run")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=32, extend="max", fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7.5)
    bar.set_label("angular distance (fraction of π)", color=style.MUTED)
    style.title(
        axes, "Angular distance",
        "How far the residual state of a window's last token turns across a run of blocks.\n"
        "Low = redundant. White dots: the best run of each size.",
    )  # fmt: skip


def _mark(axes: Axes, inspection: Inspection, remove: int, place: int) -> None:
    """Colours the best run of a size, and says what it is in the empty corner of the map."""
    if remove >= inspection.layers:
        return
    run = inspection.best_runs[remove - 1]
    last = run.first + remove - 1
    blocks = f"block {run.first}" if remove == 1 else f"blocks {run.first} to {last}"
    color = (style.PRUNED, style.HEALED)[place % 2]
    axes.plot(
        run.first, remove, "o", color=color, markersize=7.5, markeredgecolor="white",
        markeredgewidth=1.4, zorder=4,
    )  # fmt: skip
    axes.annotate(
        f"{remove} of {inspection.layers}: {blocks}, distance {run.distance:.3f}",
        (1.0, 0.97 - 0.065 * place), xycoords="axes fraction", ha="right", va="top",
        fontsize=8.5, fontweight="bold", color=color,
    )  # fmt: skip


def _draw_influence(axes: Axes, inspection: Inspection) -> None:
    scores = inspection.block_influence
    lowest = set(least(scores)[: max(1, round(0.2 * len(scores)))])
    positive = [score for score in scores if score > 0]
    log = bool(positive) and max(positive) > 12 * min(positive)
    floor = min(positive) / 1.6 if log else 0.0
    for block, score in enumerate(scores):
        axes.bar(
            block, max(score, floor) - floor, bottom=floor, width=0.72,
            color=style.PRUNED if block in lowest else style.DENSE,
        )  # fmt: skip
    if log:
        axes.set_yscale("log")
        # The style reads no mathematics, in which the default labels are written.
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(-0.7, len(scores) - 0.3)
    axes.set_xlabel("block (0 = first)")
    axes.set_ylabel("1 - mean cosine" + (", log scale" if log else ""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    axes.grid(axis="y")
    style.title(
        axes, "Block influence",
        f"How far each block turns the state, over all tokens. Coloured: the {len(lowest)} lowest.",
    )  # fmt: skip
