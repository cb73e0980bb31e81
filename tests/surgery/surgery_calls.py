"""Cuts a saved model and loads what came of it, as stock transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_export.checkpoint import Checkpoint
from prune_export.surgery import rewrite

Saved = Callable[..., Path]
PROMPT = torch.tensor([[5, 9, 40, 3, 17, 22, 8, 61], [7, 1, 1, 33, 4, 60, 59, 21]])
RAM = 2**30
DOWN = "model.layers.3.mlp.down_proj.weight"


def cut(path: Path, edits: Any, out: Path, **settings: Any) -> Checkpoint:
    source = Checkpoint.open(path)
    return rewrite(source, source.arch(), edits, out, ram_bytes=RAM, **settings)


def loaded(path: Path) -> PreTrainedModel:
    """The model as stock transformers loads it: nothing missing, nothing unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT, use_cache=False).logits
