"""Graphs of the tiny model that several tests of exporters start from."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from prune_export.exporters.tensorrt.graph import split_caches


@pytest.fixture(scope="session")
def split_graph(tiny_graph: Path) -> Path:
    """The same graph, its caches outside of attention, beside it."""
    model = onnx.load(tiny_graph, load_external_data=False)
    assert split_caches(model) == 6
    path = tiny_graph.with_name("split.onnx")
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path
