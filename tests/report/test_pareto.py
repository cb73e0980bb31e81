"""Who is beaten in quality, speed and bytes, and what the figure shows of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from prune_export.report import style
from prune_export.report.pareto import Point, beaten_by, draw_pareto


def test_a_point_is_beaten_by_one_that_is_no_worse_in_anything() -> None:
    dense = Point("dense", 10.0, 1.0, 400)
    small = Point("small", 12.0, 1.4, 300)
    worse = Point("worse", 13.0, 1.4, 300)
    larger = Point("larger", 12.5, 1.3, 350)
    assert beaten_by([dense, small, worse, larger]) == [None, None, 1, 1]
    assert beaten_by([small, small]) == [None, None]


def test_bytes_alone_keep_a_point_unbeaten() -> None:
    fast, tiny = Point("fast", 10.0, 2.0, 400), Point("tiny", 11.0, 1.0, 100)
    assert beaten_by([fast, tiny]) == [None, None]


def test_within_their_intervals_nobody_is_beaten() -> None:
    one = Point("one", 10.0, 1.0, perplexity_range=(9.6, 10.4))
    other = Point("other", 10.5, 1.0, perplexity_range=(10.1, 10.9))
    assert beaten_by([one, other]) == [None, None]
    far = Point("far", 11.5, 1.0, perplexity_range=(11.1, 11.9))
    assert beaten_by([one, far]) == [None, 0]


def test_what_was_measured_of_one_alone_decides_nothing() -> None:
    untimed, timed = Point("untimed", 9.0), Point("timed", 10.0, 1.5)
    assert beaten_by([untimed, timed]) == [None, None]
    assert beaten_by([untimed, Point("second", 11.0)]) == [None, 0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_is_beaten_by_any_that_works(broken: float) -> None:
    assert beaten_by([Point("broken", broken, 1.0, 4), Point("works", 1e6, 1.0, 4)]) == [1, None]


def test_the_one_named_is_itself_unbeaten() -> None:
    points = [Point("c", 3.0, 1.0), Point("b", 2.0, 1.0), Point("a", 1.0, 1.0)]
    assert beaten_by(points) == [2, 2, None]


@pytest.mark.parametrize("across", ["speed", "bytes"])
def test_hollow_is_beaten_and_no_two_labels_lie_on_each_other(across: str, tmp_path: Path) -> None:
    points = [
        Point(f"way {place}", 10.0 + place % 3, 1 + place / 50, 10**6 + place, group=str(place % 2))
        for place in range(6)
    ] + [Point("no number", math.nan, 1.0, 5)]  # fmt: skip
    with style.styled():
        figure = style.new_figure(7.2, 3.9)
        axes = figure.add_subplot()
        drawn = draw_pareto(axes, points, across=across)  # type: ignore[arg-type]
        style.save(figure, tmp_path / "pareto.png")
    assert [one.label for one in drawn] == [f"way {place}" for place in range(6)]
    beaten = [rival is not None for rival in beaten_by(points)[:6]]
    white = [tuple(dots.get_facecolor()[0][:3]) == (1, 1, 1) for dots in axes.collections]
    assert white == beaten
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().startswith("way")]
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
