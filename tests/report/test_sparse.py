"""What is said of sparse kernels: proven, eligible but not picked, unproven, not asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prune_export.report import caveats, summary_rows, sweeps
from prune_export.report import style as styles
from prune_export.report.figures import figure_names
from prune_export.report.reading import Report
from prune_export.report.sparse import kernels_text, pays_text, stray_text, weights_text
from prune_export.verify.results import Sparsity, Speed, from_json
from tests.report.variants import grid, made


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.of(made("sparse_engines"))


@pytest.fixture(scope="module")
def engines(report: Report) -> list[Sparsity]:
    assert report.verification is not None
    return report.verification.sparsity


def speeds(ratios: dict[int, float]) -> list[Speed]:
    return from_json(list[Speed], grid("onnx", ratios))


def test_weights_are_counted_by_pattern(engines: list[Sparsity]) -> None:
    assert weights_text(engines[0]) == "of 7 weights 6 hold 2 of 4"
    assert weights_text(engines[2]) == "of 7 weights 3 hold 2 of 4, 3 no pattern (50% zeros)"
    assert weights_text(replace(engines[0], weights=engines[0].weights[-1:])) == "none is sparse"


def test_kernels_by_what_is_proven(engines: list[Sparsity]) -> None:
    proven, refused, unasked = engines
    assert kernels_text(proven) == "6 layers eligible, 4 run sparse kernels"
    assert kernels_text(replace(proven, chosen=None, eligible=None)) == (
        "an unknown number of layers eligible, 4 run sparse kernels"
    )
    assert kernels_text(refused) == ("6 layers eligible but not picked: dense kernels were faster")
    assert kernels_text(replace(refused, eligible=0)).startswith("no layer eligible")
    assert kernels_text(replace(proven, proven=None)) == "sparse kernels allowed, unproven"
    assert kernels_text(unasked) == "ONNX Runtime multiplies dense"


def test_where_it_pays() -> None:
    assert pays_text(speeds({1: 0.9, 64: 1.0, 256: 1.1, 1024: 1.3})) == (
        "prefill from 256 to 1,024 tokens, up to 1.30× (slower at 1 token, down to 0.90×); "
        "decode nowhere"
    )
    assert pays_text(speeds({1: 1.1, 64: 1.0, 256: 1.2})) == (
        "prefill at 1, 256 tokens, up to 1.20×; decode nowhere"
    )
    assert pays_text(speeds({1: 1.1, 64: 1.2})).startswith("prefill everywhere, up to 1.20×")


def test_the_table_tells_proof_and_gain(report: Report) -> None:
    rows = [row for row in summary_rows(report) if row.group == "sparsity"]
    assert [(row.label, row.tone) for row in rows] == [
        ("sparse weights, tensorrt", "better"),
        ("sparsity off → on, prefill, tensorrt", "better"),
        ("sparsity off → on, decode, tensorrt", "better"),
        ("sparse weights, other", "worse"),
        ("sparse weights, onnx", "same"),
    ]
    assert rows[0].cells[2:] == (
        "of 7 weights 6 hold 2 of 4", "6 layers eligible, 4 run sparse kernels",
    )  # fmt: skip


def test_what_is_not_proven_is_a_limit_and_a_fallback_a_failure(report: Report) -> None:
    found = {one.text: one.kind for one in caveats(report)}
    said = [text for text in found if "layers eligible" in text or "multiplies dense" in text]
    assert [found[text] for text in said] == ["limit", "limit"]
    assert not any(text.startswith("tensorrt:") for text in said)
    stray = "gpu: 4 nodes that multiply were not run by TensorrtExecutionProvider (a, b, c, …)."
    assert found[stray] == "failure"
    assert report.verification is not None
    assert not report.verification.ok
    assert stray_text(report.verification.placement[1]) in stray


def test_a_grid_is_drawn_with_its_claims_filled(report: Report) -> None:
    assert {"sweep.png", "sparse_gain.png"} <= figure_names(report)
    with styles.styled():
        axes = styles.new_figure(7, 4).add_subplot()
        sweeps.sweep(axes, "against dense", speeds({1: 0.9, 64: 1.0, 1024: 1.3}))
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    filled = [line.get_markerfacecolor() != "white" for line in markers]
    assert filled == [True, False, True, False, False, False]  # prefill, then decode
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["prefill", "decode"]


def test_one_length_is_no_grid() -> None:
    data = made("sparse_engines")
    data["verification"]["sweep"] = grid("onnx", {64: 1.0})
    assert "sweep.png" not in figure_names(Report.of(data))
