"""A build record has one JSON form: in the store, in report.json and in a benchmark's folder."""

from __future__ import annotations

import json

from prune_export.contracts import BuildRecord

FULL = BuildRecord(
    "onnx", "3", {"precision": "fp32", "logits": "all"}, "model.onnx", 12, 3.5, {"onnx": "1.2"},
    ("within 1e-6",), {"asked": True, "weights": {"held": []}},
)  # fmt: skip


def test_there_and_back() -> None:
    written = json.loads(json.dumps(FULL.to_json()))
    assert written == FULL.to_json(), "JSON types alone: no tuple becomes a list on the way"
    assert BuildRecord.from_json(written) == FULL


def test_its_keys_and_their_order_are_those_that_reports_have() -> None:
    assert list(FULL.to_json()) == [
        "exporter", "version", "parameters", "graph", "weight_bytes", "seconds", "toolchain",
        "notes", "sparsity",
    ]  # fmt: skip


def test_a_reports_engine_may_say_less_and_more() -> None:
    told = {"directory": "onnx", "exporter": "onnx", "weight_bytes": None, "seconds": None}
    assert BuildRecord.from_json(told) == BuildRecord("onnx", "", {}, "", 0, 0.0, {})
