"""Tiny random models as transformers saves them, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_export.arch.table import table_for


def maker(new_directory: Callable[[str], Path]) -> Callable[..., Path]:
    """A function that saves a tiny model of a type; tests leave what it returns as it is."""
    made: dict[str, Path] = {}

    def save(
        model_type: str, *, shard: str = "5GB", dtype: str = "float32", **changes: Any
    ) -> Path:
        key = repr((model_type, shard, dtype, sorted(changes.items())))
        if key not in made:
            ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            torch.manual_seed(0)
            config = AutoConfig.for_model(
                model_type, **{**ends, **table_for(model_type).tiny.config, **changes}
            )
            model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.1)
            made[key] = new_directory(model_type)
            model.save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return save


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}
