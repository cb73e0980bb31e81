"""The GPU benchmark of sparse engines: its parts, and its course with ONNX Runtime's engines."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_export.verify import Engine
from prune_export.verify.results import Speed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "tensorrt.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    before = list(sys.path)
    try:
        return runpy.run_path(str(SCRIPT))
    finally:
        sys.path[:] = before


def test_engines_differ_in_what_is_measured_and_in_nothing_else(script: dict[str, Any]) -> None:
    dense, off, on = script["variants"](Path("dense"), Path("sparse"))
    entries = [script["exporter"]("tensorrt", "fp16", one, False, 8) for one in (dense, off, on)]
    assert entries[0] == entries[1]
    assert {key for key, value in vars(entries[1]).items() if value != vars(entries[2])[key]} == {
        "sparse"
    }
    assert off.checkpoint == on.checkpoint
    assert entries[2].context.most >= max(script["PROMPTS"]) + script["NEW"]
    assert script["exporter"]("tensorrt", "fp16", on, True, 8).sliding
    assert not script["exporter"]("tensorrt", "fp16", off, True, 8).sliding


@pytest.mark.slow
def test_it_runs_from_checkpoints_to_a_result(
    script: dict[str, Any],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv",
        ["tensorrt.py", "--dense", str(tiny_llama), "--sparse", str(tiny_llama), "--quick",
         "--engine", "onnx", "--precision", "fp32", "--work", str(tmp_path / "work"),
         "--results", str(tmp_path)],
    )  # fmt: skip
    asked: list[tuple[str, str, int]] = []

    def measured(one: Engine, other: Engine, workloads: Any, ids: Any, machine: Any,
                 **given: Any) -> list[Speed]:  # fmt: skip
        asked.append((one.path.name, other.path.name, len(workloads)))
        return [
            Speed(given["name"], workloads[0], phase, [1.0], [1.0], 1.0, 0.9, 1.1, 0.9, 1.1, 0.0,
                  "no speedup", 1.0, 1.0, [1.0], [1])
            for phase in ("prefill", "decode")
        ]  # fmt: skip

    monkeypatch.setitem(script["main"].__globals__, "measure_speed", measured)
    script["main"]()
    assert asked == [("fp32-0", "fp32-2", 1), ("fp32-1", "fp32-2", 1)]
    (file,) = tmp_path.glob("*-tensorrt.json")
    found = json.loads(file.read_text())["precisions"]["fp32"]
    assert list(found["speeds"]) == [
        "sparse weights, kernels on against dense weights",
        "sparse weights, kernels on against sparse weights, kernels off",
    ]
    for speeds in found["speeds"].values():
        assert [one["phase"] for one in speeds] == ["prefill", "decode"]
    assert len(found["builds"]) == 3
    assert "no speedup" in capsys.readouterr().out
