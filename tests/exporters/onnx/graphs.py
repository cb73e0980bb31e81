"""Tiny models, their graphs, and how far the logits of the two are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_export.arch.table import table_for, tables
from prune_export.contracts import Work
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.progress import Silent
from tests.arch.kinds import one_of_each

MACHINE = Machine(device="cpu", ram_bytes=4 * 1024**3, gpu_bytes=0, threads=1)
QUICK = ("llama",)
UNTRACEABLE = {name for name, table in tables().items() if table.untraceable}
"""Their code cannot be followed by torch.export: exporters refuse them in the plan."""
FAMILIES = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in sorted(tables().keys() - UNTRACEABLE)
]
NARROWED = {*one_of_each(1), "llama"} - {"gpt_bigcode"}
"""Families whose graph is made of a model to be trimmed: what is cut of a block is the same for a
kind; gpt_bigcode has one key for all its heads."""
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def saved(model_type: str, path: Path, **changes: Any) -> PreTrainedModel:
    """A tiny random model, saved at `path`; windows are shorter than the tests' sequences."""
    torch.manual_seed(0)
    settings = {**ENDS, **table_for(model_type).tiny.config}
    if settings.get("sliding_window"):
        settings["sliding_window"] = 4
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if parameter.dim() == 1 and name.endswith("weight") and "gemma" not in model_type:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.3)
    model.save_pretrained(path)
    return model


def exported(entry: Onnx, source: Path, out: Path) -> Any:
    return entry.export(source, out, Work(MACHINE, Silent(), out.parent))


def padded(vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask `[2, 9]`; the first sequence is padded on the left by three."""
    ids = np.random.default_rng(0).integers(0, vocab, (2, 9))
    mask = np.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def expected_logits(model: PreTrainedModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions), use_cache=False,
        ).logits.float().numpy()  # fmt: skip


def stepped(runner: OrtRunner, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A prompt of five, one cached token, three cached tokens at once."""
    parts = [runner.step(ids[:, a:b], mask[:, :b])[0] for a, b in ((0, 5), (5, 6), (6, 9))]
    return np.concatenate(parts, axis=1)


def error(got: np.ndarray, wanted: np.ndarray, mask: np.ndarray) -> float:
    """The largest difference at real tokens, relative to the largest logit or to one."""
    return float((np.abs(got - wanted) * mask[:, :, None]).max()) / max(1.0, np.abs(wanted).max())
