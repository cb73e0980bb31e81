"""Sparse weights are counted in the engine's graph; sparse kernels are what the build shows."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune_export.contracts import BuildRecord, Work
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify import (
    Engine,
    measure_placement,
    measure_sparsity,
    not_from_rounding,
)
from prune_export.verify.results import Placed, Sparsity, WeightPattern, from_json, to_json
from tests.verify.tiny_checkpoint import save_tiny


def record(graph: str = "model.onnx", exporter: str = "onnx", **sparsity: Any) -> BuildRecord:
    return BuildRecord(exporter, "1", {}, graph, 0, 0.0, {}, (), sparsity)


def engine(folder: Path, weight: np.ndarray) -> Path:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), str(folder / "model.onnx"))
    return folder


def test_a_dense_engine_has_nothing_to_tell(tmp_path: Path) -> None:
    assert measure_sparsity(record(), engine(tmp_path, np.ones((8, 4)))) == []


def test_a_pattern_without_sparse_kernels_is_said_as_such(tmp_path: Path) -> None:
    weight = np.tile([[1], [0], [0], [1]], (2, 4))
    (found,) = measure_sparsity(record(), engine(tmp_path, weight))
    assert found.weights == [WeightPattern("w", 8, 4, 0.5, "2 of 4")]
    assert (found.asked, found.proven) == (False, False)
    assert "no kernels for sparse weights" in found.note
    assert from_json(Sparsity, to_json(found)) == found


def test_zeros_without_a_pattern_are_told_too(tmp_path: Path) -> None:
    weight = np.ones((16, 4))
    weight[:4, 0] = 0
    (found,) = measure_sparsity(record(), engine(tmp_path, weight))
    assert found.weights == [WeightPattern("w", 16, 4, 1 / 16, "")]


@pytest.mark.parametrize("proven", [True, False, None])
def test_the_builds_own_words_decide(proven: bool | None, tmp_path: Path) -> None:
    """A set flag and weights of the pattern don't make it proven."""
    weight = np.tile([[1], [0], [0], [1]], (2, 4))
    said = record(
        asked=True, proven=proven, eligible=3, chosen=2, eligible_layers=["a", "b", "c"],
        chosen_layers=["a", "b"], tactics={"a": "sparse"}, layers=9,
    )  # fmt: skip
    (found,) = measure_sparsity(said, engine(tmp_path, weight))
    assert (found.asked, found.proven) == (True, proven)
    assert (found.eligible, found.chosen, found.tactics) == (3, 2, {"a": "sparse"})
    assert "`tensorrt` tells" in found.note


def test_an_engine_without_a_graph_has_what_its_build_counted(tmp_path: Path) -> None:
    counted = [asdict(WeightPattern("w", 8, 4, 0.5, "2 of 4"))]
    said = record("model.engine", "tensorrt", asked=True, proven=None, weights={"held": counted})
    (found,) = measure_sparsity(said, tmp_path)
    assert found.weights == [WeightPattern("w", 8, 4, 0.5, "2 of 4")]
    assert found.proven is None


@pytest.mark.slow
def test_who_runs_the_nodes_of_an_exported_engine(tmp_path: Path, machine: Machine) -> None:
    """In a process of its own; on a CPU, all of it runs there."""
    source = save_tiny(tmp_path / "tiny", layers=1)
    made = Onnx().export(source, tmp_path / "onnx", Work(machine, Silent(), tmp_path))
    (found,) = measure_placement(Engine.of(made, tmp_path / "onnx"), machine)
    assert (found.engine, found.asked, found.strayed) == ("onnx", "CPUExecutionProvider", [])
    assert found.providers.keys() == {"CPUExecutionProvider"}
    nodes = onnx.load(str(tmp_path / "onnx" / "model.onnx"), load_external_data=False).graph.node
    assert 0.8 * len(nodes) < found.providers["CPUExecutionProvider"] <= len(nodes)
    assert found.ok


@pytest.mark.slow
def test_pytorch_has_no_providers(tiny: Path, machine: Machine) -> None:
    assert measure_placement(Engine.pytorch(tiny), machine) == []


def test_a_stray_node_is_not_ok() -> None:
    assert not Placed("onnx", "CUDAExecutionProvider", {"CPUExecutionProvider": 1}, ["a"]).ok


def test_zeros_of_rounding_are_not_sparsity(tmp_path: Path) -> None:
    """A dense model in int4 has an eighth of zeros; told are those that a stage made."""
    weight = np.ones((16, 4))
    weight[:8, 0] = 0
    cases = [("int4", False, 0), ("int8", False, 0), ("int4", True, 1), ("fp32", False, 1)]
    for precision, made, told in [*cases, ("", False, 1)]:
        said = replace(record(), parameters={"precision": precision} if precision else {})
        found = measure_sparsity(said, engine(tmp_path, weight))
        assert len(found) == 1
        assert len(not_from_rounding(found, said, zeros_made=made)) == told
    asked = replace(record(asked=True), parameters={"precision": "int4"})
    found = measure_sparsity(asked, engine(tmp_path, weight))
    assert not_from_rounding(found, asked, zeros_made=False) == found
    kept = np.tile([[1], [0], [0], [1]], (4, 4))
    said = replace(record(), parameters={"precision": "int4"})
    found = measure_sparsity(said, engine(tmp_path, kept))
    assert not_from_rounding(found, said, zeros_made=False) == found
