"""Reading report.json: what is refused, what null means, and the paired interval."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from prune_export.contracts import StageLog
from prune_export.errors import CheckpointError
from prune_export.report import door
from prune_export.report.card import model_card
from prune_export.report.reading import Change, Report, perplexity_change
from prune_export.verify.results import Perplexity
from tests.report.variants import FULL, made


def entry(losses: list[float], length: int = 128) -> Perplexity:
    value = math.exp(sum(losses) / len(losses))
    return Perplexity("x", value, len(losses), length, len(losses) * (length - 1), losses)


def test_reads_the_file_and_keeps_the_raw_samples(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(FULL), encoding="utf-8")
    report = Report.load(path)
    assert report.verification is not None
    assert report.verification.to_json() == FULL["verification"]
    assert report.final_name == "healed"
    assert Report.of(report) is report


def test_keys_of_later_versions_are_ignored() -> None:
    report = made("full")
    report["new"] = 1
    report["base"]["new"] = 2
    assert Report.of(report).base.layers == 30


@pytest.mark.parametrize(
    ("part", "value", "where"),
    [
        ("version", 2, "version"),
        ("base", {"model": "m"}, "base.parameters"),
        ("stages", [{"index": 0, "kind": "bake", "name": "x"}], "stages.0.kind"),
        ("verification", {"speed": [{"engine": "x"}]}, "verification"),
    ],
)
def test_a_malformed_part_is_named(part: str, value: object, where: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Report.of(made("full") | {part: value})
    assert where in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}'])
def test_a_file_that_is_no_report(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError):
        Report.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Report.load(tmp_path / "none.json")


def test_null_is_nan() -> None:
    report = Report.of(made("not_numbers"))
    pruned = report.perplexity("pruned")
    assert pruned is not None
    assert math.isnan(pruned.value)
    assert report.verification is not None
    assert math.isnan(report.verification.speed[0].ratio)
    assert math.isnan(report.verification.gates[0].measured)


def test_paired_interval_by_hand() -> None:
    # Differences 0.1 and 0.3 alternate: mean 0.2, sample deviation sqrt(8 * 0.01 / 7) = 0.1069,
    # error 0.1069 / sqrt(8) = 0.0378.
    before = entry([1.0, 5.0] * 4)
    after = entry([1.1, 5.3] * 4)
    change = perplexity_change(before, after)
    assert change is not None
    assert change.ratio == pytest.approx(math.exp(0.2))
    assert change.low == pytest.approx(math.exp(0.2 - 1.96 * 0.0377964), rel=1e-6)
    assert change.high == pytest.approx(math.exp(0.2 + 1.96 * 0.0377964), rel=1e-6)


def test_no_interval_without_pairs() -> None:
    eight = entry([1.0] * 8)
    for other in (entry([2.0] * 9), entry([2.0] * 8, length=64)):
        change = perplexity_change(eight, other)
        assert change is not None
        assert change.low is None
    few = perplexity_change(entry([1.0] * 7), entry([2.0] * 7))
    assert few is not None
    assert few.high is None


def test_no_change_of_what_is_not_a_number() -> None:
    broken = Perplexity("x", math.nan, 8, 128, 1016, [math.nan] * 8)
    assert perplexity_change(entry([1.0] * 8), broken) is None
    assert perplexity_change(None, broken) is None


def full() -> dict[str, Any]:
    return copy.deepcopy(made("full"))


def put(report: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    place: Any = report
    for step in steps:
        place = place[step]
    place[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base.layers", 10**9),
        ("base.parameters", 10**400),
        ("result.bytes", -1),
        ("machine.cores", 10**30),
        ("stages.0.log.dropped", ["a"]),
        ("stages.0.log.dropped", 3),
        ("stages.0.log.block_scores", [{}]),
        ("stages.0.log.distance_map", [[1.0], [1.0]]),
        ("stages.1.log.loss", 0.5),
        ("stages.1.log.loss", [[None, 1.0]]),
        ("stages.1.log.notes", 1),
        ("stages.0.log.mask_digest", "a"),
        ("stages.0.seconds", math.nan),
        ("verification.perplexity", 3),
        ("data.evaluation.files", 3),
    ],
)
def test_what_readers_compute_with_has_its_type_and_bounds(path: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as refused:
        Report.of(put(full(), path, value))
    assert refused.value.where.startswith("report.json")
    assert refused.value.fix


def test_a_report_that_is_nested_without_end(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nested deeper"):
        Report.of(put(full(), "stages.0.log.extra", deep))
    (tmp_path / "report.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="nested deeper"):
        Report.load(tmp_path / "report.json")


def test_losses_that_overflow_are_infinite() -> None:
    before = Perplexity("dense", 1.0, 8, 16, 120, [0.0, 1e4] * 4)
    after = Perplexity("pruned", 2.0, 8, 16, 120, [1e5, 0.0] * 4)
    found = perplexity_change(before, after)
    assert found is not None and found.high == math.inf
    endless = Perplexity("pruned", 2.0, 8, 16, 120, [1e300, 0.0] * 4)
    assert perplexity_change(before, endless) == Change(2.0)


def test_a_refit_is_told_in_words() -> None:
    report = made("no_heal")
    stage = report["stages"][0]
    assert Report.of(report).stages[0].refitted == ""
    seams = [{"block": 12, "ridge": 0.1}, {"block": 3, "ridge": None}]
    stage["log"]["refit"] = {"taken": True, "seams": seams, "held_out_loss": [3.8, 3.4]}
    text = Report.of(report).stages[0].refitted
    assert text == (
        "refitted 1 projection before what was removed, in block 12: "
        "held-out loss 3.800 before, 3.400 after"
    )
    assert text in model_card(Report.of(report))
    stage["log"]["refit"] = {"taken": False, "why": "the stage has no calibration data"}
    text = Report.of(report).stages[0].refitted
    assert text == "no projection was refitted: the stage has no calibration data"


def test_every_part_of_a_log_that_is_checked_is_in_the_contract() -> None:
    """Readers see the contract's keys, typed; what guards against a stranger's knows no others."""
    assert door._Log.__annotations__.keys() <= StageLog.__annotations__.keys()
