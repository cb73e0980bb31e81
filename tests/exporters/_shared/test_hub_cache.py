"""Engines that lie in the Hub's cache, where every file is a link into `blobs/`."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from prune_export.errors import CheckpointError, StageError
from prune_export.exporters._shared.ort_links import openable
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.machine import Machine
from prune_export.sparsity.onnx_weights import array_of, load
from prune_export.sparsity.patterns import patterns
from prune_export.system.cached import is_within

MACHINE = Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)
COMMIT = "a" * 40


def cached(source: Path, cache: Path, *, shared: bool) -> Path:
    """The directory `source` as the Hub's cache lays it out; `shared` as huggingface_hub 2 does."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / COMMIT / source.name
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        real = blob
        if shared:
            name = hashlib.sha256(b"xet" + file.read_bytes()).hexdigest()
            real = cache / "blobs" / name[:2] / name
            real.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(os.path.relpath(real, blob.parent))
        shutil.copyfile(file, real)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def first_tensor(graph: Path) -> Any:
    return next(t for t in load(graph).graph.initializer if t.data_location == t.EXTERNAL)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_an_engine_from_the_hub_runs_and_shows_its_weights(
    shared: bool, tiny_graph: Path, tmp_path: Path
) -> None:
    source = tmp_path / "onnx"
    source.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(tiny_graph.with_name(name), source / name)
    snapshot = cached(source, tmp_path / "hub", shared=shared)
    ids = np.array([[5, 9, 40]])
    logits = []
    for graph in (tiny_graph, snapshot / "model.onnx"):
        with OrtRunner(graph, MACHINE) as runner:
            logits.append(runner.step(ids)[0])
    assert np.array_equal(*logits)
    assert patterns(snapshot / "model.onnx") == patterns(tiny_graph)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_a_link_to_elsewhere_is_refused(shared: bool, tiny_graph: Path, tmp_path: Path) -> None:
    source = tmp_path / "onnx"
    source.mkdir()
    shutil.copyfile(tiny_graph, source / "model.onnx")
    snapshot = cached(source, tmp_path / "hub", shared=shared)
    data = snapshot / "model.onnx_data"
    other = tmp_path / "hub" / "models--org--other" / "blobs" / ("b" * 64)
    other.parent.mkdir(parents=True)
    shutil.copyfile(tiny_graph.with_name("model.onnx_data"), other)
    (blobs := tmp_path / "hub" / "models--org--name" / "blobs" / "c").symlink_to(other)
    for target in (other, tiny_graph.with_name("model.onnx_data"), blobs):
        data.unlink(missing_ok=True)
        data.symlink_to(target)
        assert not is_within(data, snapshot)
        with pytest.raises(CheckpointError, match="outside of the graph's directory"):
            array_of(first_tensor(tiny_graph), snapshot)
        with pytest.raises((CheckpointError, StageError), match=r"outside of|escapes model"):
            OrtRunner(snapshot / "model.onnx", MACHINE)


def test_a_path_that_leads_up_is_not_within(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "data").write_bytes(b"x")
    assert not is_within(tmp_path / "model" / ".." / "data", tmp_path / "model")
    assert not is_within(Path("/etc/hostname"), tmp_path / "model")
    assert is_within(tmp_path / "model" / "none", tmp_path / "model")
    (tmp_path / "linked").symlink_to(tmp_path / "model")
    assert is_within(tmp_path / "linked" / "none", tmp_path / "linked")


def test_constants_inside_of_nodes_are_found_too(tmp_path: Path) -> None:
    """onnxruntime-genai keeps the tables of a long context inside of an `If`."""
    make = onnx.helper
    info = make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4])
    (source := tmp_path / "onnx").mkdir()
    branches = {}
    for number, name in enumerate(("then_branch", "else_branch")):
        table = onnx.TensorProto(name=name, dims=[4], data_type=onnx.TensorProto.FLOAT)
        table.data_location = onnx.TensorProto.EXTERNAL
        table.external_data.add(key="location", value=name)
        (source / name).write_bytes(np.full(4, number, np.float32).tobytes())
        nodes = [make.make_node("Identity", [name], ["y"])]
        branches[name] = make.make_graph(nodes, name, [], [info], [table])
    graph = make.make_graph(
        [make.make_node("If", ["c"], ["y"], **branches)], "g",
        [make.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])], [info],
    )  # fmt: skip
    model = make.make_model(graph, ir_version=10, opset_imports=[make.make_opsetid("", 21)])
    (source / "model.onnx").write_bytes(model.SerializeToString())
    snapshot = cached(source, tmp_path / "hub", shared=True)
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(openable(snapshot / "model.onnx", options), options)
    assert session.run(None, {"c": np.array(False)})[0].tolist() == [1.0] * 4
    assert session.run(None, {"c": np.array(True)})[0].tolist() == [0.0] * 4
