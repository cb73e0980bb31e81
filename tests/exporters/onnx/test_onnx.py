"""The portable ONNX graph computes what PyTorch computes: every family, every way to step."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from prune_export.arch import Arch
from prune_export.errors import MissingExtra, StageError
from prune_export.exporters._shared.ort_providers import Provider
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.onnx import Onnx, exporter
from prune_export.exporters.onnx.check import compare
from prune_export.exporters.onnx.weights import Source
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.onnx_weights import load, matrices
from prune_export.sparsity.slidesparse import holds
from tests.exporters.onnx.graphs import (
    FAMILIES,
    MACHINE,
    NARROWED,
    QUICK,
    error,
    expected_logits,
    exported,
    padded,
    saved,
    stepped,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ == "test_a_family_computes_the_same":
        every = metafunc.config.getoption("--all-pairs")
        shown = NARROWED - set(QUICK) if not every else set()
        chosen = [family for family in FAMILIES if family.values[0] not in shown]
        metafunc.parametrize("model_type", chosen)


def test_a_family_computes_the_same(model_type: str, tmp_path: Path) -> None:
    """Each family is traced once: those that test_trim.py narrows are whole with `--all-pairs`."""
    model = saved(model_type, tmp_path / "dense")
    record = exported(Onnx(), tmp_path / "dense", tmp_path / "onnx")
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5
    onnx.checker.check_model(str(tmp_path / "onnx" / record.graph), full_check=True)


def test_the_graph_has_the_hubs_names_and_only_standard_operators(llama: Any) -> None:
    model, path, record = llama
    graph = onnx.load(path / "onnx" / record.graph, load_external_data=False)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 23)]
    assert {node.domain for node in graph.graph.node} == {""}
    kinds = Counter(node.op_type for node in graph.graph.node)
    layers = model.config.num_hidden_layers
    assert kinds["Attention"] == layers
    assert kinds["RotaryEmbedding"] == 2 * layers
    assert kinds["RMSNormalization"] == 2 * layers + 1
    assert kinds["MatMul"] == 4 * layers + 1, "q, k and v, or gate and up, are not one product"
    assert kinds["Transpose"] == 0, "heads are moved, or a weight is transposed in the graph"
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    assert shapes["past_key_values.1.value"] == ["batch", heads, "past_sequence", size]
    assert shapes["present.1.key"] == ["batch", heads, "total_sequence", size]
    assert shapes["logits"] == ["batch", "sequence", model.config.vocab_size]
    assert len(shapes) == 3 + 1 + 4 * layers
    traces = (*graph.metadata_props, *(p for node in graph.graph.node for p in node.metadata_props))
    assert not traces
    assert not any(node.doc_string for node in graph.graph.node)


def test_the_record_counts_what_a_step_reads(llama: Any) -> None:
    model, path, record = llama
    embedding = model.get_input_embeddings().weight
    tied = model.config.tie_word_embeddings
    read = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.numel())
    assert record.weight_bytes == 4 * read
    assert record.graph == "model.onnx"
    assert record.notes[0] == f"1 of {model.config.num_hidden_layers} blocks traced"
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (path / "onnx" / name).read_bytes() == (path / "dense" / name).read_bytes()


@pytest.mark.slow
def test_the_same_model_gives_the_same_bytes(llama: Any, tmp_path: Path) -> None:
    """In another process with another hash seed, so that no set's or dict's order leaks."""
    _, path, _ = llama
    code = (
        "import sys; from pathlib import Path; from prune_export.contracts import Work;"
        "from prune_export.exporters.onnx import Onnx; from prune_export.machine import Machine;"
        "from prune_export.progress import Silent; a, b = map(Path, sys.argv[1:]);"
        "Onnx().export(a, b, Work(Machine('cpu', 2**32, 0, 1), Silent(), b))"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, path / "dense", tmp_path / "again"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for name in ("model.onnx", "model.onnx_data"):
        first, second = (
            hashlib.sha256((where / name).read_bytes()).hexdigest()
            for where in (path / "onnx", tmp_path / "again")
        )
        assert first == second, name


class _Whole(torch.nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits


@pytest.mark.slow
def test_stamped_equals_the_whole_traced_model(llama: Any, tmp_path: Path) -> None:
    import onnxruntime

    model, path, _ = llama
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 7))
    ones = np.ones_like(ids)
    program = torch.onnx.export(
        _Whole(model).eval(), (torch.from_numpy(ids), torch.from_numpy(ones)), dynamo=True,
        opset_version=23, verbose=False,
    )  # fmt: skip
    program.save(tmp_path / "whole.onnx")
    whole = onnxruntime.InferenceSession(
        str(tmp_path / "whole.onnx"), providers=["CPUExecutionProvider"]
    )
    (wanted,) = whole.run(None, {"input_ids": ids, "attention_mask": ones})
    with Onnx().open(path / "onnx", MACHINE) as runner:
        got, seconds = runner.step(ids)
    assert seconds > 0
    assert error(got, wanted, ones) < 1e-5


def test_reset_forgets_the_cache(llama: Any) -> None:
    model, path, _ = llama
    ids = np.random.default_rng(2).integers(0, model.config.vocab_size, (1, 4))
    with Onnx().open(path / "onnx", MACHINE) as runner:
        first, _ = runner.step(ids)
        after, _ = runner.step(ids)
        runner.reset()
        again, _ = runner.step(ids)
    assert np.array_equal(first, again)
    assert not np.allclose(first, after)


@pytest.mark.slow
def test_last_gives_the_last_positions_logits(llama: Any, tmp_path: Path) -> None:
    model, path, _ = llama
    exported(Onnx(logits="last"), path / "dense", tmp_path / "last")
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "last", MACHINE) as runner:
        got, _ = runner.step(ids, mask)
    assert got.shape == (2, 1, model.config.vocab_size)
    wanted = expected_logits(model, ids, mask)[:, -1:]
    assert error(got, wanted, np.ones((2, 1))) < 1e-5


@pytest.mark.slow
def test_layers_that_compute_with_their_number_are_traced_each(tmp_path: Path) -> None:
    model = saved("gpt2", tmp_path / "dense", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    record = exported(Onnx(), tmp_path / "dense", tmp_path / "onnx")
    assert record.notes[0] == "3 of 3 blocks traced"
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5


@pytest.mark.slow
def test_a_hundred_blocks_are_one_trace(tmp_path: Path) -> None:
    model = saved("llama", tmp_path / "dense", num_hidden_layers=100)
    with torch.no_grad():  # a hundred random blocks would otherwise magnify every rounding
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(0.1)
    model.save_pretrained(tmp_path / "dense")
    record = exported(Onnx(), tmp_path / "dense", tmp_path / "onnx")
    assert record.notes[0] == "1 of 100 blocks traced"


def test_a_graph_that_computes_something_else_is_refused(llama: Any, tmp_path: Path) -> None:
    _, path, _ = llama
    other = saved("llama", tmp_path / "other")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    config = AutoConfig.from_pretrained(path / "dense")
    stored = exporter.Checkpoint.open(tmp_path / "other")
    source = Source(stored, {name: name for name in stored.entries}, {})
    graph = path / "onnx" / "model.onnx"
    with pytest.raises(StageError, match="the prompt\n  logits differ from PyTorch's by"):
        compare(graph, config, source, torch.float32, MACHINE)


def test_a_graph_that_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(StageError, match="does not load it"):
        Onnx().open(tmp_path, MACHINE)


def test_a_provider_that_is_not_there_is_refused(llama: Any) -> None:
    _, path, _ = llama
    graph = path / "onnx" / "model.onnx"
    with pytest.raises(StageError, match=r"offers .*CPUExecutionProvider"):
        OrtRunner(graph, MACHINE, provider=Provider("tensorrt"))


def test_a_missing_package_names_its_extra(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, _ = llama
    arch = Arch.from_config(AutoConfig.from_pretrained(path / "dense").to_dict())
    Onnx().check(arch, MACHINE)
    monkeypatch.setattr(exporter, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(MissingExtra, match=r"prune-export\[onnx\]"):
        Onnx().check(arch, MACHINE)


def test_the_cost_bounds_what_is_written(llama: Any) -> None:
    _, path, _ = llama
    arch = Arch.from_config(AutoConfig.from_pretrained(path / "dense").to_dict())
    size = (path / "dense" / "model.safetensors").stat().st_size
    cost = Onnx().cost(arch, size)
    assert cost.disk_bytes >= 4 * arch.parameters()
    assert Onnx(precision="fp16").cost(arch, size).disk_bytes < cost.disk_bytes
    assert cost.seconds > 0


@pytest.mark.slow
def test_sliding_windows_compute_the_same(tmp_path: Path) -> None:
    """Every weight of a block is 6 of 8, and another matrix is not touched."""
    source, out = tmp_path / "dense", tmp_path / "onnx"
    model = saved("llama", source)
    with torch.no_grad():
        for name, matrix in model.named_parameters():
            if "proj" in name:
                outputs, inputs = matrix.shape
                # Other lanes in every row, so that no input is dead, which would be left out.
                lanes = torch.arange(outputs)[:, None, None] + torch.arange(8)
                kept = (lanes % 8 < 6).expand(outputs, inputs // 8, 8)
                matrix.mul_(kept.reshape(matrix.shape))
    model.save_pretrained(source)
    plain = exported(Onnx(), source, tmp_path / "plain")
    record = exported(Onnx(sliding=True), source, out)
    blocks = model.config.num_hidden_layers
    assert f"{4 * blocks} weights hold 6 of 8" in record.notes[2]
    assert f"{4 * blocks} gathers" in record.notes[2]
    grown = (out / "model.onnx_data").stat().st_size
    assert grown > (tmp_path / "plain" / "model.onnx_data").stat().st_size
    assert record.weight_bytes > plain.weight_bytes
    held = {m.name: holds(m.nonzero(), Nm(2, 4)) for m in matrices(load(out / "model.onnx"), out)}
    assert [name for name, sparse_ in held.items() if not sparse_] == ["lm_head.weight"]
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    ids, mask = padded(model.config.vocab_size)
    with Onnx().open(out, MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(model, ids, mask), mask) < 1e-5
