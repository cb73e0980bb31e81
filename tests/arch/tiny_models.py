"""Tiny random models of transformers, made from what the tables say in `tiny`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.deriving.instances import Instance, random_instance
from prune_export.deriving.proof import shapes_on_disk

PROMPT = torch.tensor(
    [[5, 9, 40, 3, 17, 22, 8, 61, 30, 2, 11, 50], [7, 1, 1, 33, 4, 60, 59, 21, 6, 12, 35, 44]]
)


class Tiny(Instance):
    """A tiny random model, where it is saved, its config with defaults filled in, and its Arch."""

    def logits(self, ids: torch.Tensor = PROMPT) -> torch.Tensor:
        return super().logits(ids)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT, use_cache=False).logits


def headers(path: Path) -> dict[str, tuple[int, ...]]:
    return shapes_on_disk(path)


def tiny_config(model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {**ends, **table_for(model_type).tiny.config, **changes}


def name_in_memory(arch: Arch, name: str) -> str:
    """The name of a stored tensor in transformers' model, but for experts, which it stacks."""
    return name.replace(arch.table.on_disk, arch.table.blocks, 1)


def arch_of(model_type: str, **changes: Any) -> Arch:
    """The shapes of a tiny model, from its config alone."""
    settings = {**table_for(model_type).tiny.config, **changes}
    return Arch.from_config(AutoConfig.for_model(model_type, **settings).to_dict())


def random_model(model_type: str, changes: Mapping[str, Any], path: Path) -> Tiny:
    """Every parameter is random, so that none is a zero that hides a mistake."""
    config = {"model_type": model_type, **tiny_config(model_type, changes)}
    made = random_instance(config, path)
    return Tiny(made.model, made.path, made.full, made.arch)
