"""The PNG files: which there are, that bytes follow from the report, that shapes and text hold."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from prune_export.report import draw_figures, draw_inspection, draw_summary, panels, style
from prune_export.report.figures import figure_names, figure_title, names_by_stage
from prune_export.report.reading import Report
from tests.report.variants import made


def axes_of(report: dict[str, Any], draw: str, **extra: Any) -> Axes:
    """The axes that a panel drew for a report."""
    reading = Report.of(report)
    subject = {"stage": reading.stages[extra.pop("stage")]} if "stage" in extra else {
        "report": reading
    }  # fmt: skip
    with style.styled():
        axes = style.new_figure(7, 4).add_subplot()
        getattr(panels, draw)(axes, **subject, **extra)
    return axes


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_every_promised_file_is_drawn(written: Path, tmp_path: Path) -> None:
    report = Report.of(made(written.name))
    if written.name == "full":
        for path in draw_figures(report, tmp_path):
            assert path.read_bytes() == (written / "figures" / path.name).read_bytes()
    names = {path.name for path in (written / "figures").iterdir()}
    assert names == figure_names(report)
    for path in (written / "figures").iterdir():
        with Image.open(path) as image:
            assert "Software" not in image.info
            assert min(image.size) > 200
            pixels = np.asarray(image.convert("L"))
        assert pixels.std() > 5, "an empty picture"


def test_names_by_variant() -> None:
    everything = {
        "distance_map.png", "block_scores.png", "loss_curve.png", "quality.png", "speed.png",
        "summary.png",
    }  # fmt: skip
    assert figure_names(Report.of(made("full"))) == everything
    assert figure_names(Report.of(made("no_heal"))) == everything - {"loss_curve.png"}
    assert figure_names(Report.of(made("no_export"))) == everything - {"speed.png"}
    assert figure_names(Report.of(made("least"))) == frozenset()
    assert names_by_stage(Report.of(made("two_of_each"))) == [
        ["distance_map.png", "block_scores.png"],
        ["loss_curve.png"],
        ["distance_map-2.png", "block_scores-2.png"],
        ["loss_curve-2.png"],
    ]
    assert figure_title("loss_curve-2") == figure_title("loss_curve")


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw_summary(made("least"), tmp_path / "summary.png")
    assert not (tmp_path / "summary.png").exists()
    assert draw_figures(made("least"), tmp_path / "figures") == []


@pytest.mark.slow
def test_equal_reports_give_equal_bytes_in_another_process(tmp_path: Path) -> None:
    draw_summary(made("full"), tmp_path / "here.png")
    # A user's own style changes nothing.
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 30\n", encoding="utf-8")
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from variants import made; from prune_export.report import draw_summary\n"
        "draw_summary(made('full'), Path(sys.argv[2]))"
    )
    there = tmp_path / "there.png"
    subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(there)],
        check=True, env={**os.environ, "MATPLOTLIBRC": str(tmp_path)}, timeout=120,
    )  # fmt: skip
    assert (tmp_path / "here.png").read_bytes() == there.read_bytes()


def test_the_source_is_kept_in_the_picture(tmp_path: Path) -> None:
    assert draw_summary(made("full"), tmp_path / "a.png", source="sha256:ab")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["Source"] == "sha256:ab"


def test_inspection(tmp_path: Path) -> None:
    log = made("full")["stages"][0]["log"]
    shown = {key: log[key] for key in ("distance_map", "block_scores", "block_score_name")}
    draw_inspection(shown, "some/model", tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (2300, 920)


def test_the_cut_is_ringed_where_it_was_made() -> None:
    axes = axes_of(made("full"), "distance_map", stage=0)
    rings = [patch for patch in axes.patches if patch.get_edgecolor()[:3] != (1, 1, 1)]
    assert [patch.get_xy() for patch in rings] == [(12.5, 5.5)]  # starts at 13, six blocks
    assert texts(axes)[0] == "removed: blocks 13–18\ndistance 0.142"
    log = made("full")["stages"][0]["log"]
    assert log["distance_map"][13][19] == pytest.approx(0.142, abs=5e-4)


def test_scattered_cuts_are_each_ringed() -> None:
    report = made("full")
    report["stages"][0]["log"]["dropped"] = [3, 9, 10]
    axes = axes_of(report, "distance_map", stage=0)
    rings = [patch for patch in axes.patches if patch.get_edgecolor()[:3] != (1, 1, 1)]
    assert [patch.get_xy() for patch in rings] == [(2.5, 0.5), (8.5, 1.5)]


def test_quality_bars_end_at_their_values() -> None:
    axes = axes_of(made("full"), "quality")
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(
        [21.93, 96.71, 32.46, 32.46, 32.71], abs=0.01
    )
    assert [text.strip() for text in texts(axes)[:5]] == [
        "21.93", "96.71", "32.46", "32.46", "32.71",
    ]  # fmt: skip
    assert axes.get_xscale() == "linear"


def test_quality_says_what_is_no_number_and_when_it_is_logarithmic() -> None:
    words = [text.strip() for text in texts(axes_of(made("not_numbers"), "quality"))]
    assert words[1:5] == ["not a number", "infinite", "not a number", "not a number"]
    axes = axes_of(made("exploded"), "quality")
    assert axes.get_xscale() == "log"
    assert "(log scale)" in axes.get_xlabel()


def test_speed_shows_verdicts_noise_and_bound() -> None:
    axes = axes_of(made("full"), "speed")
    words = texts(axes)[:4]
    assert words[0] == "1.24× faster (1.22–1.24)"
    assert words[2] == "no speedup: 1.01× (1.01–1.02)"
    bands = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert bands[2] == pytest.approx((0.97, 1.031))
    dotted = [line for line in axes.lines if line.get_linestyle() not in ("-", "None")]
    assert [float(line.get_xdata()[0]) for line in dotted] == pytest.approx([1.1875, 1.2011])


def test_an_unknown_bound_is_not_drawn() -> None:
    report = made("full")
    for one in report["verification"]["speed"]:
        one["bound"] = 0.0
    axes = axes_of(report, "speed")
    assert not [line for line in axes.lines if line.get_linestyle() not in ("-", "None")]
    assert axes.get_xlim()[0] > 0.9


def test_block_scores_colour_what_was_removed() -> None:
    axes = axes_of(made("full"), "block_scores", stage=0)
    dots = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    gone = [int(line.get_xdata()[0]) for line in dots if line.get_color() == style.PRUNED]
    assert gone == [13, 14, 15, 16, 17, 18]
    assert len(dots) == 30


def test_running_mean_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, 4.0])
    assert panels.running_mean(values, 1) == pytest.approx([1.5, 3.0, 4.0, 5.0])
    assert panels.running_mean(values, 9) == pytest.approx([3.25] * 4)


def test_labels_are_one_line_short_and_drawable() -> None:
    assert style.label("a\nb\tc") == "a b c"
    assert style.label("模x🦙") == "?x?"
    assert len(style.label("x" * 400, 20)) == 20
    assert style.label("$x^2$") == "$x^2$"


def test_losses_that_are_no_numbers_are_counted() -> None:
    axes = axes_of(made("not_numbers"), "loss_curve", stage=1)
    assert any("6 losses were not numbers" in text for text in texts(axes))
    line = axes.lines[0].get_ydata()
    assert len(line) == 114
    assert all(math.isfinite(value) for value in np.asarray(line))
