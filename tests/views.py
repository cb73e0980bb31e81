"""What a run gives a method: a model and windows of tokens to decide on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prune_export.calibrate import CalibrationContext, ExtraPass, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from tests.arch.tiny_models import Tiny, random_model

MACHINE = Machine("cpu", 8 << 30, 0, 1)


def random_ids(windows: int, length: int, seed: int) -> torch.Tensor:
    """`[windows, length]` tokens that every tiny model knows."""
    return torch.randint(3, 60, (windows, length), generator=torch.Generator().manual_seed(seed))


def view_of(
    model: Tiny | Checkpoint,
    ids: torch.Tensor,
    scratch: Path | None = None,
    progress: Any = None,
    engines: Any = None,
) -> ModelView:
    """A model to decide on, with nothing gathered yet."""
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model.path)
    context = CalibrationContext(TokenSet.of(ids), MACHINE, scratch, progress, engines)
    return ModelView(checkpoint.arch(), checkpoint, {}, context)


def random_view(
    folder: Path, model_type: str, windows: int = 3, seed: int = 1
) -> tuple[Tiny, ModelView]:
    """A tiny model of a family in `folder`, and windows of 16 tokens to decide on."""
    tiny = random_model(model_type, {}, folder / "model")
    (folder / "scratch").mkdir()
    return tiny, view_of(tiny, random_ids(windows, 16, seed), folder / "scratch")


def decided(method: Any, model: ModelView) -> Any:
    """What a method decides after the statistics that it asks for are gathered."""
    asked = [s for s in method.statistics(model.arch) if not isinstance(s, ExtraPass)]
    results = model.gather(asked) if asked else {}
    return method.decide(ModelView(model.arch, model.checkpoint, results, model.context))
