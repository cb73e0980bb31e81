"""Results side by side: what may be compared, what is left out, and what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from prune_export.errors import CheckpointError
from prune_export.recipe.stages import Workload
from prune_export.report.comparison import (
    Comparison,
    Entry,
    as_reference,
    from_reports,
    with_speed,
    write_comparison,
)
from prune_export.verify.results import Perplexity, Speed
from tests.report.variants import HOSTILE, made


def speed(phase: str, ratio: float, spread: float, floor: float) -> Speed:
    return Speed(
        engine="onnx", workload=Workload(1, 8, 4), phase=phase,  # type: ignore[arg-type]
        dense_seconds=[1.0], pruned_seconds=[1 / ratio], ratio=ratio, low=ratio - spread,
        high=ratio + spread, floor_low=1 / floor, floor_high=floor, bound=0.0, verdict="faster",
        dense_tokens_per_second=10.0, pruned_tokens_per_second=10.0 * ratio,
    )  # fmt: skip


def perplexity(name: str, value: float, shift: float) -> Perplexity:
    losses = [3.0 + place / 10 + shift for place in range(12)]
    return Perplexity(name, value, 12, 64, 12 * 63, losses)


def result(folder: Path, change: Any = None) -> Path:
    folder.mkdir()
    report = made("full")
    if change:
        change(report)
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def test_a_speed_is_no_surer_than_the_noise_floor() -> None:
    first = Entry("first", "onnx", perplexity("first", 20.0, 0.0), bytes=100)
    sure = with_speed(Entry("sure", "onnx", bytes=100), [speed("decode", 1.5, 0.01, 1.1)])
    assert sure.decode_range == pytest.approx((1.5 / 1.1, 1.65))
    first = as_reference(first, [sure])
    assert first.decode == 1.0
    assert first.decode_range == pytest.approx((1 / 1.1, 1.1))
    assert first.tokens_per_second == 10.0


def test_who_is_beaten_is_said_in_table_and_json() -> None:
    good = with_speed(
        Entry("good", "onnx int8", perplexity("good", 20.0, 0.0), bytes=50),
        [speed("decode", 1.5, 0.01, 1.02), speed("prefill", 1.2, 0.01, 1.02)],
    )
    first = as_reference(Entry("dense", "onnx", perplexity("d", 20.0, 0.0), bytes=100), [good])
    found = Comparison((first, good))
    assert found.beaten == ["good", ""]
    assert found.rows[0][-1] == "good"
    assert found.rows[1][3:6] == ("1.00× (1.00–1.00)", "1.50× (1.47–1.53)", "1.20× (1.18–1.22)")
    written = found.to_json()["entries"]
    assert [one["beaten_by"] for one in written] == ["good", None]
    assert len(written[1]["speeds"][0]["pruned_seconds"]) == 1


def test_results_of_one_text_and_machine_stand_in_one_table(tmp_path: Path) -> None:
    found = from_reports([result(tmp_path / "a"), result(tmp_path / "b")])
    labels = [one.label for one in found.entries]
    assert labels[1:4] == ["a", "a/onnx", "a/genai"]
    assert labels[4:] == ["b", "b/onnx", "b/genai"]
    assert found.entries[2].perplexity
    assert found.entries[2].decode == 1.0
    assert found.entries[3].decode == pytest.approx(57.01 / 27.41)
    assert "not timed in turns" in " ".join(found.caveats)


def test_another_text_or_machine_is_left_out_and_said(tmp_path: Path) -> None:
    def other_text(report: dict[str, Any]) -> None:
        report["data"]["evaluation"]["fingerprint"] = "0" * 64

    def other_machine(report: dict[str, Any]) -> None:
        report["verification"]["machine"]["processor"] = "another"

    found = from_reports([
        result(tmp_path / "a"), result(tmp_path / "b", other_text),
        result(tmp_path / "c", other_machine),
    ])  # fmt: skip
    by_label = {one.label: one for one in found.entries}
    assert by_label["b/onnx"].perplexity is None
    assert by_label["b/onnx"].decode is not None
    assert by_label["c/onnx"].perplexity is not None
    assert by_label["c/onnx"].decode is None
    assert "b: its perplexities are of another text" in found.caveats[0]
    assert "c: it was timed on another machine" in found.caveats[1]


def test_page_and_picture_are_the_same_bytes_each_time_and_run_nothing(tmp_path: Path) -> None:
    folders = [result(tmp_path / "a"), result(tmp_path / "b")]
    found = from_reports(folders, [HOSTILE[:80], "b"])
    first = write_comparison(found, tmp_path / "one")
    second = write_comparison(found, tmp_path / "two")
    assert [path.name for path in first] == ["comparison.png", "comparison.html"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    page = first[1].read_text(encoding="utf-8")
    assert "<script" not in page
    assert "default-src 'none'" in page
    # On a narrow page each cell says what it is.
    assert page.count('data-label="perplexity"') == len(found.entries)
    assert page.count('data-label="beaten by"') == len(found.entries)
    with Image.open(first[0]) as image:
        assert min(image.size) > 600


def test_a_directory_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        from_reports([tmp_path])
