"""Tiny random models on disk, windows of a language that can be learned, and one way to heal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_export.arch.table import table_for
from prune_export.calibrate import CalibrationContext, TokenSet, keep_answers
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord, Teacher, Work
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.system.processes import ALONE, Team

MACHINE = Machine("cpu", 4 << 30, 0, 1)
QUICK: dict[str, Any] = {
    "rank": 4, "steps": 12, "batch": 4, "learning_rate": 2e-2, "compute_dtype": "float32",
}  # fmt: skip


def save_tiny(path: Path, model_type: str, dtype: str = "float32", **changes: Any) -> Path:
    """Saves a tiny random model of a family, with a side file."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = {**ends, **table_for(model_type).tiny.config, "num_hidden_layers": 3, **changes}
    for key in {"layer_types", *table_for(model_type).config.per_layer} & settings.keys():
        settings[key] = settings[key][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}', encoding="utf-8")
    return path


def windows(samples: int = 40, length: int = 16, vocab: int = 64) -> TokenSet:
    """Windows in which each token follows from the one before: something to learn."""
    start = torch.arange(samples).unsqueeze(1) * 5
    return TokenSet.of((start + 3 * torch.arange(length)) % vocab)


def teacher_at(path: Path, tokens: TokenSet, kept: Path, team: Team = ALONE) -> Teacher:
    """The model of a directory as a teacher, whose answers are kept below `kept`."""

    def answers(outcomes: int, temperature: float) -> Path:
        out = kept / f"answers-{outcomes}-{temperature}"
        if not out.exists():
            out.mkdir(parents=True)
            opened = Checkpoint.open(path)
            keep_answers(
                opened, CalibrationContext(tokens, MACHINE), out, outcomes=outcomes,
                temperature=temperature, arch=opened.arch(), team=team,
            )  # fmt: skip
        return out

    return Teacher(path, path.name, answers)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(24).reshape(2, 12), use_cache=False).logits


@pytest.fixture
def heal(tmp_path: Path) -> Callable[..., tuple[HealRecord, Path]]:
    """Heals a checkpoint in directories of its own: (record, where the result is)."""
    count = 0

    def run(
        healer: Any,
        checkpoint: Path,
        *,
        scratch: Path | None = None,
        tokens: TokenSet | None = None,
        progress: Any = None,
        teacher: Path | None = None,
    ) -> tuple[HealRecord, Path]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        tokens = tokens or windows()
        work = Work(MACHINE, progress or Silent(), scratch or tmp_path / f"scratch{count}")
        if teacher is not None:
            work = replace(work, teacher=teacher_at(teacher, tokens, tmp_path / "kept"))
        return healer.heal(checkpoint, tokens, out, work), out

    return run
