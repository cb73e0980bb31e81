"""Packed weights in onnxruntime-genai: both runtimes run them, and they are seen to be sparse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from prune_export.contracts import BuildRecord
from prune_export.errors import CheckpointError, PlanError
from prune_export.exporters.ort_genai import OrtGenai
from prune_export.kernels import LIBRARY
from prune_export.kernels.compiling import compiler
from prune_export.kernels.packing import OPERATOR
from prune_export.verify.engine import Engine
from prune_export.verify.sparsity import measure_sparsity
from tests.exporters.ort_genai.test_ort_genai import MACHINE, export, model_in, some_ids

pytestmark = [
    pytest.mark.usefixtures("genai_in_this_process"),
    pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler for the kernel"),
]
ENTRY = OrtGenai(precision="int8", packed="sparse", logits="all")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with four of five weights of its blocks zero, and a tied head."""
    path = tmp_path_factory.mktemp("sparse")
    model: Any = model_in(path, "Llama", {"tie_word_embeddings": True})
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter *= torch.rand(parameter.shape, generator=random) < 0.2
    model.save_pretrained(path)
    return path


@pytest.mark.slow
def test_a_packed_engine_runs_in_both_runtimes(sparse: Path, tmp_path: Path) -> None:
    """The trial at the end of an export has onnxruntime-genai itself load the library, and run."""
    plain = replace(ENTRY, packed="no")
    before = export(plain, sparse, tmp_path / "plain")
    record: BuildRecord = export(ENTRY, sparse, tmp_path / "packed")
    said = json.loads((tmp_path / "packed" / "genai_config.json").read_text())
    assert said["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY
    found = []
    for entry, folder in ((plain, "plain"), (ENTRY, "packed")):
        with entry.open(tmp_path / folder, MACHINE) as runner:
            ids = some_ids(1, 20)
            found.append(np.concatenate([runner.step(ids)[0], runner.step(ids[:, :1])[0]], axis=1))
    assert abs(found[0] - found[1]).max() < 2e-2 * abs(found[0]).max()
    assert record.weight_bytes < 0.7 * before.weight_bytes
    graph = onnx.load(tmp_path / "packed" / record.graph, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert "MatMulNBits" not in kinds
    assert record.sparsity["proven"] is True
    # Five products in each of three blocks, as queries, keys and values are one; not the head.
    assert record.sparsity["chosen"] == kinds.count(OPERATOR) - 1 == 15
    assert any("packed weights" in note for note in record.notes)
    (measured,) = measure_sparsity(record, tmp_path / "packed")
    assert measured.proven
    assert "calls" in measured.note
    assert sum(weight.zeros > 0.75 for weight in measured.weights) == 15
    engine = Engine.of(record, tmp_path / "packed")
    with pytest.raises(CheckpointError, match="holds machine code"):
        engine.open(MACHINE)


def test_its_twin_stores_zeros_as_well() -> None:
    assert ENTRY.without_sparsity() == replace(ENTRY, packed="dense")
    assert replace(ENTRY, packed="no").without_sparsity() is None


def test_what_the_kernel_cannot_do_is_refused_in_the_plan() -> None:
    with pytest.raises(PlanError, match="block_size: 16"):
        OrtGenai(packed="sparse", block_size=16)
    with pytest.raises(PlanError, match="precision: fp16"):
        OrtGenai(packed="dense", precision="fp16")
