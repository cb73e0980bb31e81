"""onnxruntime-genai's graph of a wide checkpoint is narrow, and runs in both runtimes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from prune_export.exporters.ort_genai import OrtGenai
from tests.exporters.ort_genai.test_ort_genai import MACHINE, export, logits_of, model_in, some_ids
from tests.zeroed_models import Zeroed

pytestmark = pytest.mark.usefixtures("genai_in_this_process")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "phi": ("Phi", {"hidden_size": 128, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {"sliding_window": 8, "original_max_position_embeddings": 512}),
    "granite": ("Granite", {"residual_multiplier": 0.5}),
}
OWN_CHAIN = ("gemma2", "phi", "granite")
"""Families whose blocks the builder chains in their own way: a rest of dead sub-blocks stays."""


def wide(path: Path, family: str, keys: dict[str, Any]) -> Zeroed:
    model_in(path, family, {**keys, "num_hidden_layers": 5})
    model = Zeroed(path)
    for layer in range(5):
        model.channels(layer, range(3 * layer, 5 * layer))
    model.heads(1, [(1, 0), (1, 1)])
    model.heads(2, [(0, 1), (1, 0)])
    for layer, role in ((0, "o"), (4, "o"), (4, "down"), (3, "down")):
        model.whole(layer, role, bias=True)
    model.save()
    return model


def engine_is_narrow(name: str, path: Path, model: Zeroed, exporter: OrtGenai) -> None:
    record = export(exporter, path, path.parent / "engine")
    assert record.notes[0] == "trimmed: 2 attention, 2 mlp, 4 heads, 6 channels"
    graph = onnx.load(path.parent / "engine" / record.graph, load_external_data=False).graph
    heads = [
        value.type.tensor_type.shape.dim[1].dim_value for value in graph.input
        if value.name.endswith(".key")
    ]  # fmt: skip
    assert heads == ([1, 1, 2, 2, 1] if name in OWN_CHAIN else [1, 2, 2])
    said = json.loads((path.parent / "engine" / "genai_config.json").read_text())
    assert said["model"]["decoder"]["num_hidden_layers"] == len(heads)
    all_of_it = 4 * sum(prod(model.arch.shape(tensor)) for tensor in model.arch.stored())
    assert record.weight_bytes < 0.8 * all_of_it


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_wide_model_becomes_a_narrow_engine(name: str, tmp_path: Path) -> None:
    """The export itself compares both runtimes with PyTorch on the wide checkpoint."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "wide"
    model = wide(source, *CASES[name])
    exporter = OrtGenai(precision="fp32", logits="all")
    engine_is_narrow(name, source, model, exporter)
    ids = some_ids(1, 20)
    with exporter.open(tmp_path / "engine", MACHINE) as runner:
        parts = [runner.step(ids[:, a:b])[0] for a, b in ((0, 7), (7, 8), (8, 20))]
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(source).eval(), ids)
    assert np.abs(np.concatenate(parts, axis=1) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_are_narrow_too(precision: Any, tmp_path: Path) -> None:
    wide(tmp_path / "wide", *CASES["llama"])
    record = export(OrtGenai(precision=precision), tmp_path / "wide", tmp_path / "engine")
    assert record.notes[0].startswith("trimmed: 2 attention, 2 mlp")


@pytest.mark.slow
def test_a_model_without_attention_keeps_one_cache_for_the_runtime(tmp_path: Path) -> None:
    model_in(tmp_path / "wide", "Llama", {"num_hidden_layers": 2})
    model = Zeroed(tmp_path / "wide")
    for layer in range(2):
        model.whole(layer, "o", bias=True)
    model.save()
    record = export(OrtGenai(precision="fp32"), tmp_path / "wide", tmp_path / "engine")
    assert record.notes[0] == "trimmed: 2 attention"
