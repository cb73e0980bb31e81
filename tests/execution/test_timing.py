"""Engines that a method has timed: real ones of the right widths, on a clock that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from prune_export.checkpoint import Checkpoint
from prune_export.execution import Options, run, timing
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import open_base
from prune_export.execution.timing import TimedEngines
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe
from prune_export.store import Artifact, Store

RECIPE = """\
recipe: 1
description: As fast as asked.
data:
  calibration: {files: [calibration.txt], samples: 4, length: 32}
stages:
  - prune: {method: ziplm, target: {speedup: 1.4, tolerance: 0.1}}
"""


def weights(engine: Artifact) -> int:
    """Bytes of weights in an engine."""
    return int(engine.record["weight_bytes"])


pytestmark = pytest.mark.usefixtures("measured_here")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Artifact, Artifact]]:
    """Engines are as fast as they are small; what was compared is kept."""
    compared: list[tuple[Artifact, Artifact]] = []

    def speed(context: RunContext, dense: Artifact, engine: Artifact, workload: Any) -> float:
        assert (workload.batch, workload.prompt, workload.new) == (1, 128, 32)
        compared.append((dense, engine))
        return weights(dense) / weights(engine)

    monkeypatch.setattr(timing, "engine_speed", speed)
    return compared


@pytest.fixture
def engines(tiny_llama: Path, tmp_path: Path) -> TimedEngines:
    machine = Machine.detect(device="cpu", threads=1)
    context = RunContext(Store(tmp_path / "store"), machine, Silent())
    model = open_base(context, "tiny", tiny_llama, None)
    return TimedEngines(context, Checkpoint.open(tiny_llama).arch(), model.path, model.id)


@pytest.mark.slow
def test_an_engine_has_the_widths_asked_for(
    engines: TimedEngines, clock: list[tuple[Artifact, Artifact]]
) -> None:
    sizes = {f"mlp.{i}": 16 for i in range(6)} | {f"kv.{i}": 1 for i in range(6)}
    assert engines.speedup(sizes, "onnx", (1, 128, 32)) > 1.2
    ((_, engine),) = clock
    graph = onnx.load(engine.path / "model.onnx", load_external_data=False).graph
    shapes = {tuple(tensor.dims) for tensor in graph.initializer}
    assert (16, 32) in shapes, "down's transpose, 16 channels of 32 residual ones"
    assert (64, 32) not in shapes


def test_widths_that_differ_are_zeros_in_a_stock_model(engines: TimedEngines) -> None:
    made = Checkpoint.open(engines._shaped({"mlp.0": 16, "mlp.2": 0, "kv.1": 0}).path)
    assert made.arch().sizes == engines.arch.sizes
    down = "model.layers.{}.mlp.down_proj.weight"
    assert made.read(down.format(0))[:, :16].any()
    assert not made.read(down.format(0))[:, 16:].any()
    assert made.read(down.format(1)).all()
    assert not made.read(down.format(2)).any()
    assert not made.read("model.layers.1.self_attn.o_proj.weight").any()


@pytest.mark.slow
def test_engines_are_narrow_also_where_widths_differ(
    engines: TimedEngines, clock: list[tuple[Artifact, Artifact]]
) -> None:
    sizes = {f"mlp.{i}": 16 for i in range(6)}
    alike = engines.speedup(sizes, "onnx", (1, 128, 32))
    apart = engines.speedup({**sizes, "mlp.0": 8, "mlp.1": 24}, "onnx", (1, 128, 32))
    assert apart == pytest.approx(alike, rel=0.02)


@pytest.mark.slow
def test_a_run_comes_out_as_fast_as_asked(
    tiny_llama: Path, corpus: Path, tmp_path: Path, clock: list[tuple[Artifact, Artifact]]
) -> None:
    machine = Machine.detect(device="cpu", threads=1)
    options = Options(tmp_path / "out", tmp_path / "store", machine)
    result = run(Recipe.parse(RECIPE, root=corpus), str(tiny_llama), options)
    dense, last = clock[-1]
    assert weights(dense) / weights(last) == pytest.approx(1.4, rel=0.1)
    log = result.report["stages"][0]["log"]
    assert 1 / log["rounds"][-1]["left"] == pytest.approx(1.4, rel=0.1)
    sizes = Checkpoint.open(result.out).arch().sizes
    assert {axis: sizes[axis] for axis in log["sizes"]} == log["sizes"]
    assert len({sizes[f"mlp.{i}"] for i in range(6)}) == 1
