"""Engines with packed weights: the same logits, fewer bytes, and a kernel that is seen to run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from prune_export.errors import CheckpointError, PlanError, StageError
from prune_export.exporters.onnx import Onnx
from prune_export.kernels import LIBRARY, Library
from prune_export.kernels.compiling import compiler
from prune_export.kernels.packing import OPERATOR
from prune_export.sparsity.patterns import patterns
from prune_export.verify.engine import Engine
from tests.exporters.onnx.test_onnx import MACHINE, exported, saved

pytestmark = pytest.mark.skipif(
    compiler() is None, reason="there is no C++ compiler, and the kernel is shipped as source"
)
BLOCK = 32


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama of bf16 numbers, with three of four weights of its blocks zero."""
    path = tmp_path_factory.mktemp("sparse")
    model = saved("llama", path, hidden_size=64, intermediate_size=160)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter *= torch.rand(parameter.shape, generator=random) < 0.25
    model.to(torch.bfloat16).to(torch.float32).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_a_packed_engine_computes_the_same_from_fewer_bytes(
    sparse: Path, tmp_path: Path, precision: str
) -> None:
    plain = Onnx(precision=precision, block_size=BLOCK)  # type: ignore[arg-type]
    packed = replace(plain, packed="sparse")
    before = exported(plain, sparse, tmp_path / "plain")
    record = exported(packed, sparse, tmp_path / "packed")
    ids = np.random.default_rng(1).integers(0, 60, (2, 12))
    found = []
    for entry, folder in ((plain, "plain"), (packed, "packed")):
        with entry.open(tmp_path / folder, MACHINE) as runner:
            found.append(np.concatenate([runner.step(ids)[0], runner.step(ids[:, :1])[0]], axis=1))
    exact = 1e-5 if precision == "fp32" else 2e-2
    assert abs(found[0] - found[1]).max() < exact * abs(found[0]).max()
    assert record.weight_bytes < before.weight_bytes
    sizes = [
        (tmp_path / folder / "model.onnx_data").stat().st_size for folder in ("plain", "packed")
    ]
    assert record.sparsity["proven"] is True
    assert record.sparsity["chosen"] >= 10
    graph = onnx.load(tmp_path / "packed" / "model.onnx", load_external_data=False)
    nodes = [node.op_type for node in graph.graph.node]
    assert nodes.count(OPERATOR) >= 10
    assert "DequantizeLinear" not in nodes
    zeros = {one.name: one.zeros for one in patterns(tmp_path / "packed" / "model.onnx")}
    assert sum(share > 0.7 for share in zeros.values()) == record.sparsity["chosen"]
    assert precision != "fp32" or sizes[1] < sizes[0]


ENTRY = Onnx(precision="int8", block_size=BLOCK, packed="sparse")


@pytest.fixture(scope="module")
def engine(sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("packed") / "onnx"
    return Engine.of(exported(ENTRY, sparse, path), path)


@pytest.mark.slow
def test_dense_is_the_twin_that_sparse_is_timed_against(
    sparse: Path, engine: Engine, tmp_path: Path
) -> None:
    twin = ENTRY.without_sparsity()
    assert twin == replace(ENTRY, packed="dense")
    assert twin.without_sparsity() is None
    record = exported(twin, sparse, tmp_path / "dense")
    assert engine.weight_bytes < 0.75 * record.weight_bytes
    assert record.sparsity == {}
    ids = np.random.default_rng(1).integers(0, 60, (1, 12))
    found = []
    for path in (engine.path, tmp_path / "dense"):
        with ENTRY.open(path, MACHINE) as runner:
            found.append(runner.step(ids)[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5 * abs(found[1]).max())


@pytest.mark.slow
def test_the_operators_calls_are_counted(engine: Engine) -> None:
    library = Library(engine.path / LIBRARY)
    graph = onnx.load(engine.path / "model.onnx", load_external_data=False)
    nodes = sum(node.op_type == OPERATOR for node in graph.graph.node)
    with ENTRY.open(engine.path, MACHINE) as runner:
        before = library.calls
        for _ in range(3):
            runner.step(np.ones((1, 1), np.int64))
        assert library.calls == before + 3 * nodes


def test_it_holds_machine_code_and_so_needs_trust(engine: Engine) -> None:
    assert engine.runs_code
    with pytest.raises(CheckpointError, match="holds machine code"):
        engine.open(MACHINE)
    replace(engine, trusted=True).open(MACHINE).__exit__(None, None, None)
    lies = replace(engine, parameters=dict(engine.parameters) | {"packed": "no"})
    assert not lies.runs_code
    with pytest.raises(StageError, match=r"does not load[\s\S]*open it as the result"):
        lies.open(MACHINE)


def test_damaged_weights_are_refused_when_the_engine_is_opened(
    engine: Engine, tmp_path: Path
) -> None:
    shutil.copytree(engine.path, tmp_path / "onnx")
    data = tmp_path / "onnx" / "model.onnx_data"
    held = bytearray(data.read_bytes())
    held[held.rfind(b"PEPACKED") + 100] ^= 1
    data.write_bytes(held)
    with pytest.raises(StageError, match="checksum"):
        ENTRY.open(tmp_path / "onnx", MACHINE)


def test_a_library_of_another_machine_says_so(engine: Engine, tmp_path: Path) -> None:
    shutil.copytree(engine.path, tmp_path / "onnx")
    (tmp_path / "onnx" / LIBRARY).write_bytes(b"\x7fELF of somewhere else")
    with pytest.raises(StageError, match=r"does not load[\s\S]*export the engine again here"):
        ENTRY.open(tmp_path / "onnx", MACHINE)


@pytest.mark.slow
def test_weights_that_cannot_be_packed_say_why(tmp_path: Path) -> None:
    saved("llama", tmp_path / "dense")
    with pytest.raises(StageError, match=r"no bf16 numbers[\s\S]*precision: int8"):
        exported(Onnx(packed="dense"), tmp_path / "dense", tmp_path / "onnx")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"precision": "fp16"}, "precision: fp16"),
        ({"precision": "int8", "block_size": 16}, "block_size: 16"),
        ({"precision": "int8", "provider": "cuda"}, "multiplies on the CPU"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_in_the_plan(
    keys: dict[str, object], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        Onnx(packed="sparse", **keys)  # type: ignore[arg-type]


def test_recipes_without_the_key_keep_their_ids() -> None:
    from prune_export.recipe.stages import plain

    assert "packed" not in plain(Onnx())
    assert plain(Onnx(precision="int8", packed="dense"))["packed"] == "dense"
