"""Counts and values of a config are bounded before anything is made by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.config import full_config
from prune_export.errors import CheckpointError, PlanError, PruneExportError
from prune_export.exporters.ort_genai import support

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip


def opened(path: Path, **said: Any) -> Checkpoint:
    import json

    config = {"model_type": "llama", **SIZES, **said}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Checkpoint.open(path, weights=False)


@pytest.mark.parametrize(
    "said",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**30},
        {"num_labels": 10**9},
        {"hidden_size": 10**30},
        {"vocab_size": 2**50},
        {"model_type": "gpt2", "n_layer": 10**9},
        {"model_type": "qwen3_moe", "num_experts": 10**8},
        {"model_type": "qwen3_moe", "num_experts": 4_000, "num_hidden_layers": 24},
        {"model_type": "qwen3_moe", "num_experts": 4, "decoder_sparse_step": 0},
        {"model_type": "qwen3_moe", "num_experts": 4, "mlp_only_layers": [[1]]},
    ],
)
def test_counts_without_end_are_refused_at_once(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(PruneExportError) as refused:
        opened(tmp_path, **said).arch().parameters()
    assert "config.json" in refused.value.where


def test_a_large_model_is_none_of_these(tmp_path: Path) -> None:
    large = opened(tmp_path, num_hidden_layers=200, hidden_size=16_384, num_attention_heads=128)
    assert large.arch().layers == 200


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"head_dim": {"a": 1}}, "head_dim"),
        ({"head_dim": float("nan")}, "head_dim"),
        ({"hidden_size": 32, "num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "32", "num_attention_heads": 2}, "hidden_size"),
        ({}, "hidden_size"),
    ],
)
def test_a_heads_size_must_be_a_number(config: dict[str, Any], key: str) -> None:
    with pytest.raises(PlanError, match=f"config.json  {key}"):
        support.head_size(config)


def test_rotary_values_must_be_numbers() -> None:
    for part in (float("nan"), {"a": 1}, "0.5", -1, True):
        with pytest.raises(PlanError, match="partial_rotary_factor"):
            support._fraction({"partial_rotary_factor": part})
    rope = {"full_attention": {"rope_theta": {}}, "sliding_attention": {"rope_theta": 1.0}}
    with pytest.raises(PlanError, match="rope_theta"):
        support.corrections({"model_type": "gemma3_text", "rope_parameters": rope})
    with pytest.raises(PlanError, match="rope_theta"):
        support.corrections(
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_theta": 1}}}
        )


def test_the_config_class_is_not_asked_to_count_either(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="max_window_layers"):
        full_config({"model_type": "qwen2", "max_window_layers": 10**9}, tmp_path)
