"""Reads a model directory lazily: everything is checked, no weight is read until asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `file`, bytes `[start, stop)` in it, its dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A validated model directory."""

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
