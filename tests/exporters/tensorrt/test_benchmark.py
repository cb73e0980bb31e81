"""The GPU benchmark of sparse engines: its parts, and its course with ONNX Runtime's engines."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import StageError
from prune_export.exporters.tensorrt.binding import _MODULES
from prune_export.verify import Engine
from prune_export.verify.results import Speed

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu" / "sparse_engines.py"


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
        ["sparse_engines.py", "--dense", str(tiny_llama), "--sparse", str(tiny_llama), "--quick",
         "--engine", "onnx", "--precision", "fp32", "--work", str(tmp_path / "work"),
         "--name", "engines", "--results", str(tmp_path)],
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
    (file,) = tmp_path.glob("*-engines.json")
    found = json.loads(file.read_text())["precisions"]["fp32"]
    assert list(found["speeds"]) == [
        "sparse weights, kernels on against dense weights",
        "sparse weights, kernels on against sparse weights, kernels off",
    ]
    for speeds in found["speeds"].values():
        assert [one["phase"] for one in speeds] == ["prefill", "decode"]
    assert len(found["builds"]) == 3
    assert "no speedup" in capsys.readouterr().out


def test_a_precision_that_fails_is_a_result_and_an_exit_code(
    script: dict[str, Any], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys, "argv",
        ["sparse_engines.py", "--dense", str(tiny_llama), "--sparse", str(tiny_llama), "--quick",
         "--engine", "onnx", "--precision", "fp32", "int8", "--work", str(tmp_path / "work"),
         "--name", "engines", "--results", str(tmp_path)],
    )  # fmt: skip

    def build(entry: Any, *_: Any) -> Any:
        raise StageError("here", "no") if entry.precision == "int8" else RuntimeError("out of it")

    monkeypatch.setitem(script["main"].__globals__, "build", build)
    with pytest.raises(SystemExit, match="1"):
        script["main"]()
    (file,) = tmp_path.glob("*-engines.json")
    found = json.loads(file.read_text())["precisions"]
    assert found["fp32"]["failed"].rstrip().endswith("RuntimeError: out of it")
    assert "here" in found["int8"]["failed"]


def test_no_script_hides_a_library() -> None:
    """A script's directory comes first where Python looks for modules."""
    names = {file.stem for file in SCRIPT.parent.glob("*.py")}
    assert not names & {name for pair in _MODULES.values() for name in pair}
    assert not names & (sys.stdlib_module_names | {"torch", "onnx", "onnxruntime", "triton"})


def test_each_step_of_the_gpu_run_stands_alone(tmp_path: Path) -> None:
    """Here none can do anything; all are tried, and named at the end."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *import\\ torch*|*Tensorrt*) exit 0;; esac\nexit 3\n'
    )
    python.chmod(0o755)
    (tmp_path / "results").mkdir()
    done = subprocess.run(
        ["bash", str(SCRIPT.with_name("run.sh")), str(tmp_path), str(tmp_path)],
        env={**os.environ, "PYTHON": str(python), "RESULTS": str(tmp_path / "results")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    failed = re.findall("FAILED: (?!exit)(.*)", done.stdout)
    assert failed == [
        "tests", "demo", "demo report", "prune to 2 of 4", "prune to 6 of 8", "tensorrt, 2 of 4",
        "tensorrt, 6 of 8", "rtx, 2 of 4", "rtx, 6 of 8", "sparse kernels", "aoti", "aoti report",
    ]  # fmt: skip
    (log,) = (tmp_path / "results").glob("*-gpu-run.log")
    assert "== demo FAILED: exit code 3" in log.read_text()
