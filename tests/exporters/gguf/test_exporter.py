"""`export: gguf`: planned, written with what belongs to it, checked by llama.cpp, not opened."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.errors import PlanError, StageError
from prune_export.exporters.gguf import Gguf, check
from prune_export.exporters.gguf.writing import write_gguf
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify import Engine

Make = Callable[..., Path]
MACHINE = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
HAS_LLAMA_CPP = importlib.util.find_spec("xllamacpp") is not None


def test_a_file_its_tokenizer_and_a_record_of_the_check(model_of: Make, tmp_path: Path) -> None:
    model = model_of("llama", max_position_embeddings=64)
    entry = Gguf(type="f32")
    entry.check(Checkpoint.open(model).arch(), MACHINE)
    out = tmp_path / "gguf"
    record = entry.export(model, out, Work(MACHINE, Silent(), tmp_path))
    assert {"model.gguf", "config.json", "tokenizer.json"} <= {one.name for one in out.iterdir()}
    assert record.weight_bytes == (out / "model.gguf").stat().st_size
    said = record.notes[-1]
    if HAS_LLAMA_CPP:
        assert said.startswith("llama.cpp generates PyTorch's likeliest token 16 of 16 times")
    else:
        assert said == "not checked by llama.cpp: xllamacpp is not installed"
    shutil.copytree(model, tmp_path / "of another name")
    again = tmp_path / "again"
    entry.export(tmp_path / "of another name", again, Work(MACHINE, Silent(), tmp_path))
    assert (again / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()


def test_it_is_not_opened_and_says_why(model_of: Make, tmp_path: Path) -> None:
    engine = Engine("gguf", tmp_path)
    assert not engine.runs_on(MACHINE)
    assert "no logits step by step" in engine.why_not(MACHINE)
    with pytest.raises(StageError, match="llama-cli"):
        engine.open(MACHINE)


def test_the_plan_refuses_other_families(model_of: Make) -> None:
    with pytest.raises(PlanError, match="llama, mistral, qwen2, qwen3"):
        Gguf().check(Checkpoint.open(model_of("gpt2")).arch(), MACHINE)


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="xllamacpp is not installed")
def test_a_file_of_another_model_is_found_out(model_of: Make, tmp_path: Path) -> None:
    model = model_of("llama", max_position_embeddings=64)
    shutil.copytree(model, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= -1
    weights["model.layers.0.mlp.down_proj.weight"] *= -3
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    write_gguf(tmp_path / "other", tmp_path / "model.gguf", "f32")
    with pytest.raises(StageError, match="log probabilities are up to"):
        check.compare(model, tmp_path / "model.gguf", "f32", MACHINE)
    (tmp_path / "model.gguf").write_bytes(b"no GGUF")
    with pytest.raises(StageError, match="exit code"):
        check.compare(model, tmp_path / "model.gguf", "f32", MACHINE)
