"""Graphs of the tiny model that several tests of exporters start from."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from prune_export.contracts import Work
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.tensorrt.graph import split_caches
from prune_export.machine import Machine
from prune_export.progress import Silent

MACHINE = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)


@pytest.fixture(scope="session")
def tiny_graph(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's fp32 graph, all logits."""
    out = tmp_path_factory.mktemp("graph")
    Onnx().export(tiny_llama, out, Work(MACHINE, Silent(), out.parent))
    return out / "model.onnx"


@pytest.fixture(scope="session")
def split_graph(tiny_graph: Path) -> Path:
    """The same graph, its caches outside of attention, beside it."""
    model = onnx.load(tiny_graph, load_external_data=False)
    assert split_caches(model) == 6
    path = tiny_graph.with_name("split.onnx")
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path
