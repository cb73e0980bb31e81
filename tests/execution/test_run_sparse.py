"""Which engines a run compares when weights are sparse: dense, and itself with sparsity off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import CheckpointError
from prune_export.execution import Options, measure, run
from prune_export.kernels.compiling import compiler
from prune_export.machine import Machine
from prune_export.recipe import Recipe
from prune_export.recipe.stages import Workload
from prune_export.results.opening import reported_engines
from prune_export.verify import Engine
from prune_export.verify.results import Speed

RECIPE = """\
recipe: 1
stages:
  - prune: {method: magnitude, nm: {keep: 6, of: 8}}
export:
  - onnx: {sliding: true}
verify:
  parity: false
  generation: false
  speed: {workloads: [{batch: 1, prompt: 8, new: 2}], sweep: {batch: [1, 2], prompt: [1, 8]}}
"""


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_a_sparse_engine_is_timed_against_dense_and_against_itself(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Engine, Engine, tuple[Workload, ...]]] = []

    def timed(
        dense: Engine, pruned: Engine, workloads: Sequence[Workload], *_: Any, **__: Any
    ) -> list[Speed]:
        asked.append((dense, pruned, tuple(workloads)))
        one = Speed("onnx", workloads[0], "decode", [1.0], [1.0], 1.0, 0.9, 1.1, 0.9, 1.1, 0.0,
                    "no speedup", 1.0, 1.0)  # fmt: skip
        return [replace(one, workload=workload) for workload in workloads]

    monkeypatch.setattr(measure, "measure_speed", timed)  # timing alone would take minutes
    options = Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))
    result = run(Recipe.parse(RECIPE), str(tiny_llama), options)

    single, grid = (Workload(1, 8, 2),), tuple(Workload(b, p, 4) for b in (1, 2) for p in (1, 8))
    assert [workloads for *_, workloads in asked] == [single, grid, single, grid]
    paths = [(dense.path, pruned.path) for dense, pruned, _ in asked]
    assert paths[0] == paths[1] != paths[2] == paths[3]
    assert len({pruned for _, pruned in paths}) == 1
    off = asked[2][0]
    assert (off.parameters["sliding"], asked[2][1].parameters["sliding"]) == (False, True)

    found = result.verification
    assert len(found.sweep) == 4
    (sparsity,) = found.sparsity
    held = {weight.pattern for weight in sparsity.weights}
    assert held == {"2 of 4", ""}
    assert [one.workload for one in sparsity.gain + sparsity.sweep] == [*single, *grid]
    (placed,) = found.placement
    assert placed.ok
    report = json.loads((result.out / "report.json").read_text())
    assert report["verification"]["sparsity"][0]["weights"][0]["pattern"] == "2 of 4"
    assert (result.out / "figures" / "sparse_gain.png").is_file()
    assert (result.out / "figures" / "sweep.png").is_file()
    assert "no kernels for sparse weights" in (result.out / "README.md").read_text()


PACKED = """\
recipe: 1
stages:
  - prune: {method: magnitude, sparsity: 0.8}
export:
  - onnx: {precision: int8, block_size: 32, packed: sparse}
verify:
  generation: false
  speed: {workloads: [{batch: 1, prompt: 8, new: 2}]}
"""


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler for the kernel")
@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
def test_packed_weights_are_timed_against_the_same_stored_dense(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, Any, bool]] = []

    def timed(
        dense: Engine, pruned: Engine, workloads: Sequence[Workload], *_: Any, **__: Any
    ) -> list[Speed]:
        packed = [one.parameters["packed"] for one in (dense, pruned)]
        asked.append((*packed, dense.path == pruned.path))
        return [
            Speed("onnx", workload, "decode", [1.0], [1.0], 1.0, 0.9, 1.1, 0.9, 1.1, 0.0,
                  "no speedup", 1.0, 1.0)
            for workload in workloads
        ]  # fmt: skip

    monkeypatch.setattr(measure, "measure_speed", timed)  # timing alone would take minutes
    options = Options(tmp_path / "out", tmp_path / "store", Machine.detect(device="cpu", threads=1))
    result = run(Recipe.parse(PACKED), str(tiny_llama), options)
    assert asked == [("sparse", "sparse", False), ("dense", "sparse", False)]
    found = result.verification
    (parity,) = found.parity
    assert parity.ok
    (sparsity,) = found.sparsity
    assert sparsity.proven
    assert len(sparsity.gain) == 1
    assert sum(weight.zeros > 0.7 for weight in sparsity.weights) == 24  # of 6 blocks, 4 products
    assert sparsity.chosen in (24, 25)  # the head may have enough that rounding made zero
    (placed,) = found.placement
    assert placed.ok
    card = (result.out / "README.md").read_text()
    assert 'options.register_custom_ops_library(path + "/onnx/libprune_export_packed.so")' in card
    assert "which is machine code for Linux" in card
    # Whoever gets the result runs no machine code of it without saying so.
    engines = reported_engines(result.out, trust=False, store=None)
    with pytest.raises(CheckpointError, match="holds machine code"):
        engines["onnx"].open(options.machine)
    own = reported_engines(result.out, trust=False, store=options.store)
    own["onnx"].open(options.machine).__exit__(None, None, None)
