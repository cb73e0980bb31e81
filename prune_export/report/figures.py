"""Draws the report's figures as PNG files; a figure exists only where its numbers do.

    distance_map.png   angular distance, first block x block count, with the cut marked
    block_scores.png   one score a block, the removed ones coloured
    loss_curve.png     healing loss
    search.png         a search's candidates, pruned and shortly healed
    pareto.png         the same by quality over measured speed
    quality.png        perplexity of dense, pruned, healed and each engine
    speed.png          speed against the dense engine, with intervals and the A/A noise band
    sweep.png          speed against the dense engine over prompt lengths and batches
    sparse_gain.png    the same against the engine itself with sparsity off
    summary.png        the three that matter most, side by side, for a README

A second prune or heal stage adds `distance_map-2.png` and so on. Matplotlib is imported when the
first figure is planned: half a second that `prune-export plan` and engines in processes do without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prune_export.contracts import StageLog
from prune_export.report.reading import Report, StageReading
from prune_export.report.sparse import grids

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]


def draw_figures(report: Report | Mapping[str, Any], out: Path) -> list[Path]:
    """Draws every figure that the report has numbers for into `out`; same report, same bytes."""
    from prune_export.report import style

    report = Report.of(report)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with style.styled():
        for planned in _plan(report):
            figure = style.new_figure(*planned.size)
            planned.draw(figure.add_subplot())
            style.save(figure, out / planned.name)
            written.append(out / planned.name)
        if _summary(report, out / "summary.png"):
            written.append(out / "summary.png")
    return written


_TITLES: Final = {
    "distance_map": "Angular distance of every run of blocks, with the cut marked",
    "block_scores": "Score of each block, the removed ones coloured",
    "loss_curve": "Loss while healing",
    "search": "Validation perplexity of each candidate of the search",
    "pareto": "Quality over measured speed of the search's candidates",
    "quality": "Perplexity of each model",
    "speed": "Speed of each engine against its dense twin",
    "sweep": "Speed against the dense engine, over prompt lengths",
    "sparse_gain": "Speed against the same engine with sparsity off, over prompt lengths",
    "comparison": "Quality over decoding speed and over bytes of all that is compared",
    "summary": "What was removed, what it cost, what it gained",
}


def figure_title(stem: str) -> str:
    """The title of a figure, for a caption or a screen reader."""
    return _TITLES.get(stem.partition("-")[0], stem)


def figure_names(report: Report) -> frozenset[str]:
    """The files that `draw_figures` would write."""
    names = frozenset(planned.name for planned in _plan(report))
    return names | ({"summary.png"} if _summary_parts(report) else set())


def names_by_stage(report: Report) -> list[list[str]]:
    """Lists the figure files of each stage, in the order of the stages."""
    planned = _plan(report)
    return [
        [one.name for one in planned if one.stage == place] for place in range(len(report.stages))
    ]


def draw_summary(report: Report | Mapping[str, Any], path: Path, *, source: str = "") -> bool:
    """Draws the wide summary figure alone; False where there is nothing to draw.

    `source` is kept in the PNG's `Source` text, to tell later which report it shows.
    """
    from prune_export.report import style

    with style.styled():
        return _summary(Report.of(report), path, source)


@dataclass(frozen=True)
class _Planned:
    """A figure to draw; `stage` is its stage's place in the report, None where it has none."""

    name: str
    draw: Draw
    size: tuple[float, float]
    stage: int | None = None


def _plan(report: Report) -> list[_Planned]:
    from prune_export.report import panels, sweeps
    from prune_export.report.pareto import pareto

    found: list[_Planned] = []

    def add(stem: str, draw: Draw, size: tuple[float, float], stage: int | None = None) -> None:
        count = sum(one.name.startswith(stem) for one in found)
        name = f"{stem}-{count + 1}.png" if count else f"{stem}.png"
        found.append(_Planned(name, draw, size, stage))

    for place, stage in enumerate(report.stages):
        if has_map(stage.log):
            add("distance_map", partial(panels.distance_map, stage=stage), (6.4, 4.9), place)
        if stage.log.get("block_scores"):
            add("block_scores", partial(panels.block_scores, stage=stage), (7.2, 3.2), place)
        if stage.losses:
            add("loss_curve", partial(panels.loss_curve, stage=stage), (7.2, 3.2), place)
    for search in report.searches:
        if any(one.pruned is not None for one in search.candidates):
            height = 1.3 + 0.42 * sum(one.pruned is not None for one in search.candidates)
            add("search", partial(panels.search, found=search), (7.2, height))
        if len(search.timed) > 1 or len(search.points) > 1:
            add("pareto", partial(pareto, found=search), (7.2, 3.9))
    checks = report.verification
    if checks and checks.perplexity:
        height = 1.25 + 0.38 * len(checks.perplexity)
        add("quality", partial(panels.quality, report=report), (7.2, height))
    if checks and checks.speed:
        many = len({one.workload for one in checks.speed}) > 1
        height = 1.45 + (0.52 if many else 0.42) * len(checks.speed)
        add("speed", partial(panels.speed, report=report), (7.2, height))
    for stem, title, speeds in grids(report):
        add(stem, partial(sweeps.sweep, title=title, speeds=speeds), (7.2, 3.6))
    return found


def draw_inspection(log: StageLog, model: str, path: Path) -> None:
    """Draws the distance map beside the block scores, as found before any cut, in one PNG.

    `log` has `distance_map`, `block_scores` and `block_score_name`, as a method's decision does.
    """
    from prune_export.report import panels, style

    stage = StageReading(index=0, kind="prune", name="inspect", log=log)
    with style.styled():
        figure = style.new_figure(11.5, 4.6)
        figure.suptitle(style.label(model, 60), x=0.006, ha="left", fontsize=10.5, color=style.INK)
        left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.1))
        panels.distance_map(left, stage)
        panels.block_scores(right, stage)
        style.save(figure, path)


def has_map(log: StageLog) -> bool:
    """Whether a stage's log holds a distance map that is not empty."""
    table = log.get("distance_map") or ()
    return len(table) > 1 and any(value is not None for row in table for value in row)


def _summary_parts(report: Report) -> list[tuple[Draw, float]]:
    """The panels of the wide figure, each with its relative width."""
    from prune_export.report import panels

    parts: list[tuple[Draw, float]] = []
    stage = next((one for one in report.prunes if has_map(one.log)), None)
    scored = next((one for one in report.prunes if one.log.get("block_scores")), None)
    if stage is not None:
        parts.append((partial(panels.distance_map, stage=stage, compact=True), 1.15))
    elif scored is not None:
        parts.append((partial(panels.block_scores, stage=scored, compact=True), 1.2))
    checks = report.verification
    if checks and checks.perplexity:
        parts.append((partial(panels.quality, report=report, compact=True), 0.95))
    if checks and checks.speed:
        parts.append((partial(panels.speed, report=report, compact=True), 1.35))
    return parts


def _summary(report: Report, path: Path, source: str = "") -> bool:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from prune_export.report import style

    parts = _summary_parts(report)
    if not parts:
        return False
    widths = [width for _, width in parts]
    figure = style.new_figure(3.0 * sum(widths), 3.35)
    figure.suptitle(_headline(report), x=0.006, ha="left", fontsize=10.5, color=style.INK)
    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(wspace=0.08, w_pad=0.08, h_pad=0.06)
    drawn = figure.subplots(1, len(parts), width_ratios=widths, squeeze=False)[0]
    for axes, (draw, _) in zip(drawn, parts, strict=True):
        draw(axes)
    style.save(figure, path, source)
    return True


def _headline(report: Report) -> str:
    from prune_export.report import style

    done = " and ".join(dict.fromkeys(style.label(stage.name, 24) for stage in report.stages))
    name = style.label(report.base.name, 40)
    blocks = f"{name}: {report.base.layers} → {report.result.layers} blocks"
    return f"{blocks} by {done}" if done else blocks
