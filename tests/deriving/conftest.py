from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch import outside
from prune_export.deriving.instances import config_class, quietly


@pytest.fixture(autouse=True)
def _no_tables_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes known of families is forgotten after it."""
    monkeypatch.setenv(outside.VARIABLE, "")


@pytest.fixture
def config_of() -> Callable[..., dict[str, Any]]:
    """A full config of a model type, as transformers writes it, with changes."""

    def make(model_type: str, **changes: Any) -> dict[str, Any]:
        with quietly():
            return dict(config_class(model_type)(**changes).to_dict())

    return make


@pytest.fixture
def tiny_other(tiny_llama: Path, tmp_path: Path) -> Path:
    """A random model of a type that has no table (biogpt), with a tokenizer."""
    import shutil

    from prune_export.deriving.instances import build

    config = {
        "model_type": "biogpt",
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    folder = tmp_path / "tiny-biogpt"
    torch.manual_seed(0)
    model = build(config)
    with quietly():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tiny_llama / name).exists():
            shutil.copyfile(tiny_llama / name, folder / name)
    return folder
