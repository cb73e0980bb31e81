"""Edits, and the only code that applies them to weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Keep:
    """Keep only `index` (ascending) of an axis such as `mlp.3`, in every tensor that uses it."""

    axis: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """Remove whole blocks; those left are renumbered."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Overwrite:
    """Replace a tensor's values; `value` is called when the tensor is written, and then freed."""

    tensor: str
    value: Callable[[], torch.Tensor]


Edit = Keep | Drop | Overwrite
