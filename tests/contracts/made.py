"""Methods with few keys, and what a run would give them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from prune_export.arch import Arch
from prune_export.calibrate import CalibrationContext, ExtraPass, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine

MACHINE = Machine("cpu", 8 << 30, 0, 1)


def some_ids() -> torch.Tensor:
    """Three windows of calibration tokens."""
    return torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))


def plain_view(checkpoint: Checkpoint, scratch: Path) -> ModelView:
    """A model to decide on, with nothing gathered yet."""
    context = CalibrationContext(TokenSet.of(some_ids()), MACHINE, scratch)
    return ModelView(checkpoint.arch(), checkpoint, {}, context)


def units_of(cls: Any) -> tuple[str | None, ...]:
    """What a method can remove, the first by default; (None,) where it has no choice."""
    return get_args(get_type_hints(cls)["unit"]) if hasattr(cls, "unit") else (None,)


def an_instance(cls: Any, unit: str | None = None) -> Any:
    """The entry with its defaults and an amount: one block, or a fraction where it cuts others."""
    fields = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    if "remove" in fields:
        values = {"remove": 1}
    elif "sparsity" in fields:
        values = {"sparsity": 0.5}
    # A method that trains does so briefly.
    values |= {name: 2 for name in ("rounds", "steps") if name in fields}
    values |= {name: 0 for name in ("protect_first", "protect_last") if name in fields}
    return cls(**values) if unit is None else cls(**values, unit=unit)


def view_for(method: Any, checkpoint: Checkpoint, scratch: Path) -> ModelView:
    """What a run gives a method: the statistics that it asked for, and the means to more."""
    asked = method.statistics(checkpoint.arch())
    view = plain_view(checkpoint, scratch)
    first = [statistic for statistic in asked if not isinstance(statistic, ExtraPass)]
    return dataclasses.replace(view, results=view.gather(first)) if asked else view


def alike(arch: Arch) -> bool:
    """Whether all blocks have the same shapes; where not, only data says what will be left."""
    blocks = [sorted(arch.shape(tensor) for tensor in arch.block(i)) for i in range(arch.layers)]
    return all(block == blocks[0] for block in blocks)
