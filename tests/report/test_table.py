"""The summary rows: words, numbers and tones, worked by hand from the fixture."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from prune_export.report.reading import Report, StageReading, runs, shorten, text_from_blocks
from prune_export.report.table import (
    Row,
    escape_markdown,
    markdown,
    number,
    percent_change,
    summary_rows,
    times,
    where_to_look,
)
from tests.report.variants import HOSTILE, made


def row(name: str, label: str) -> Row:
    (found,) = [one for one in summary_rows(made(name)) if one.label == label]
    return found


def test_sizes() -> None:
    assert row("full", "blocks").cells == ("blocks", "30", "24", "−6 (blocks 13–18)")
    assert row("full", "parameters").cells == ("parameters", "134.5M", "113.3M", "−15.8 %")
    assert row("full", "checkpoint").cells[1:] == ("513.13 MiB", "432.11 MiB", "−15.8 %")


@pytest.mark.parametrize(
    ("pattern", "keep_zeros", "expected"),
    [
        ("2 of 4", None, [("zeros made by wanda", "", "50.0 % of 106.2M", "2 of 4 kept")]),
        ("0.5 unstructured", True, [("zeros made by wanda", "", "50.0 % of 106.2M", "no pattern")]),
        ("2 of 4", False, []),
    ],
)
def test_zeros_are_told_without_an_engine(
    pattern: str, keep_zeros: bool | None, expected: list[Any]
) -> None:
    log = {"pattern": pattern, "zeros": 53_084_160, "weights": 106_168_320, "mask_digest": "a"}
    stages = [StageReading(0, "prune", "wanda", log=log)]
    if keep_zeros is not None:
        stages.append(StageReading(1, "heal", "lora", {"keep_zeros": keep_zeros}))
    report = replace(Report.of(made("full")), stages=stages)
    found = [one.cells for one in summary_rows(report) if one.label.startswith("zeros")]
    assert found == expected


def test_quality_is_a_multiple_with_a_paired_interval() -> None:
    healed = row("full", "perplexity, healed")
    assert healed.cells[1:] == ("21.93", "32.46", "1.48× (1.47–1.49)")
    assert healed.tone == "worse"


def test_speed_words() -> None:
    assert row("full", "decode, onnx").change == "1.17× faster (1.16–1.17)"
    assert row("full", "decode, onnx").tone == "better"
    plain = row("full", "prefill, genai")
    assert plain.change == "no speedup: 1.01× (1.01–1.02)"
    assert plain.tone == "same"
    slow = row("slower", "decode, onnx")
    assert slow.change == "0.72× slower (0.70–0.75)"
    assert slow.tone == "worse"


def test_what_is_not_a_number_is_said() -> None:
    assert row("not_numbers", "perplexity, pruned").result == "not a number"
    assert row("not_numbers", "perplexity, healed").result == "infinite"
    assert row("not_numbers", "perplexity, healed").change == "broken"
    assert row("not_numbers", "prefill, onnx").change == "no speedup: not a number"


def test_what_was_not_measured_is_said() -> None:
    assert row("no_verification", "verification").result == "not run"
    labels = [one.label for one in summary_rows(made("nothing_measured"))]
    assert labels == ["blocks", "parameters", "checkpoint"]
    assert row("large", "arc_easy, acc_norm").dense == "not measured"
    assert row("large", "mmlu, acc").change == "−0.0721"


def test_failures_are_rows() -> None:
    rows = {one.label: one for one in summary_rows(made("failures"))}
    gate = rows["gate: onnx decode speedup (batch 1, prompt 128, new 32)"]
    assert (gate.dense, gate.result, gate.change) == ("claimed 1.40", "1.16", "FAILED")
    assert rows["reload"].result == "FAILED"
    assert rows["parity, onnx"].change == "logit error 3.5, allowed 0.001"


def test_workloads_are_told_apart_where_there_are_several() -> None:
    labels = {one.label for one in summary_rows(made("large")) if one.group == "speed"}
    assert "decode, onnx (prompt 128, new 32)" in labels
    assert "decode, onnx (batch 8, prompt 2048, new 256)" in labels


def test_places() -> None:
    places = dict(where_to_look(made("full")))
    assert list(places) == [".", "onnx/", "genai/", "report.html", "README.md"]
    assert "genai/" not in dict(where_to_look(made("no_export")))


@pytest.mark.parametrize("name", ["full", "hostile", "not_numbers", "large", "least"])
def test_markdown_has_four_cells_a_line_whatever_the_names(name: str) -> None:
    rows = summary_rows(made(name))
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    for line in lines:
        assert len(line.replace(r"\|", "").strip("|").split("|")) == 4
        assert "<" not in line
        assert "```" not in line


def test_escaping() -> None:
    assert escape_markdown("a_b *c* _d_ |e| [f](g) `h`\n# i") == (
        r"a_b \*c\* \_d\_ \|e\| \[f\](g) \`h\` \# i"
    )
    assert escape_markdown("<b>&") == "&lt;b&gt;&amp;"
    assert "<script" not in escape_markdown(HOSTILE)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (21.931, "21.93"), (1234.5, "1,234"), (4.1e7, "4.1e+07"), (math.nan, "not a number"),
        (-math.inf, "infinite"), (0.0, "0.00"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_times_and_percent() -> None:
    assert times(1.234) == "1.23×"
    assert times(math.nan) == "not a number"
    assert percent_change(100, 84.2) == "−15.8 %"
    assert percent_change(100, 100) == "0 %"
    assert percent_change(100_000, 99_990) == "−<0.1 %"
    assert percent_change(100, 110) == "+10.0 %"
    assert percent_change(0, 1) == ""


def test_runs_of_blocks() -> None:
    assert runs([7, 3, 5, 6]) == [(3, 3), (5, 7)]
    assert text_from_blocks([7, 3, 5, 6]) == "3, 5–7"
    assert text_from_blocks([]) == "none"


def test_shorten_keeps_both_ends() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert len(shorten("x" * 999, 28)) == 28


def test_removed_blocks_are_the_base_models_through_two_stages() -> None:
    # 13-18 go first; of what is left, places 12 and 13 are blocks 12 and 19.
    assert Report.of(made("two_of_each")).removed_blocks == (12, 13, 14, 15, 16, 17, 18, 19)
