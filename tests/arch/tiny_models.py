"""Tiny random models of transformers, made from what the tables say in `tiny`."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_export.arch import Arch
from prune_export.arch.table import table_for

PROMPT = torch.tensor(
    [[5, 9, 40, 3, 17, 22, 8, 61, 30, 2, 11, 50], [7, 1, 1, 33, 4, 60, 59, 21, 6, 12, 35, 44]]
)


@dataclass(frozen=True)
class Tiny:
    """A tiny random model, where it is saved, its config with defaults filled in, and its Arch."""

    model: PreTrainedModel
    path: Path
    full: dict[str, Any]
    arch: Arch

    def logits(self) -> torch.Tensor:
        return logits(self.model)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT, use_cache=False).logits


def headers(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a directory's one safetensors file, read without any library."""
    with (path / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def tiny_config(model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {**ends, **table_for(model_type).tiny.config, **changes}


def arch_of(model_type: str, **changes: Any) -> Arch:
    """The shapes of a tiny model, from its config alone."""
    settings = {**table_for(model_type).tiny.config, **changes}
    return Arch.from_config(AutoConfig.for_model(model_type, **settings).to_dict())


def random_model(model_type: str, changes: Mapping[str, Any], path: Path) -> Tiny:
    """Every parameter is random, so that none is a zero that hides a mistake."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **tiny_config(model_type, changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    stored = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6 if parameter.dim() > 1 else 0.3)
            if parameter.dim() == 1:
                parameter.add_(0.5)
        for name, buffer in model.named_buffers():
            if buffer.dim() and name in stored:
                buffer.normal_(std=0.3)
    model.save_pretrained(path)
    full = AutoConfig.from_pretrained(path).to_dict()
    return Tiny(model, path, full, Arch.from_config(full))
