from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prune_export.arch.table import table_for


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a tiny random model with transformers, once for all tests: they leave it as it is."""
    made: dict[str, Path] = {}

    def save(
        model_type: str, *, shard: str = "5GB", dtype: str = "float32", **changes: Any
    ) -> Path:
        key = repr((model_type, shard, dtype, sorted(changes.items())))
        if key not in made:
            ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            tiny = table_for(model_type).tiny
            assert tiny is not None
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **{**ends, **tiny.config, **changes})
            model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.1)
            made[key] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[key], max_shard_size=shard)
        return made[key]

    return save
