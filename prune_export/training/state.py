"""Saves and restores the state of a training, in one file that is replaced whole.

The adapters, AdamW's moments and the loss curve are all there is to keep: data order, dropout and
learning rate are functions of the seed and the step, so no generator's state is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

_FILE: Final = "training.safetensors"
_META: Final = "prune_export.training"


@dataclass(frozen=True)
class State:
    """The state of a training after `step` optimizer steps.

    `tensors` holds `<parameter>`, and `<parameter>|mean` and `|square` (AdamW's moments) once a
    step was taken. `losses` are [step, loss, learning rate]; `held_out` the losses measured so
    far; `seconds` the time spent, over all the runs that it took; `tokens` those that counted.
    """

    step: int = 0
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    losses: tuple[tuple[int, float, float], ...] = ()
    held_out: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0

    def save(self, scratch: Path, key: str) -> None:
        """Saves it over the last save, atomically."""
        from safetensors.torch import save_file

        known = {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if item.name != "tensors"
        }
        meta = {_META: json.dumps({**known, "key": key})}
        tensors = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()
        }
        # Written from where they are: all weights in training would else be in memory once more.
        with _whole(scratch / _FILE) as partial:
            save_file(tensors, partial, metadata=meta)

    @staticmethod
    def load(scratch: Path, key: str) -> State:
        """Loads the save under the same key, or makes a fresh state."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(scratch / _FILE, framework="pt") as file:
                known: dict[str, Any] = json.loads(file.metadata()[_META])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError, KeyError, TypeError, ValueError):
            return State()
        if known.pop("key") != key:
            return State()
        losses = tuple((int(step), loss, rate) for step, loss, rate in known.pop("losses"))
        return State(tensors=tensors, losses=losses, **known)


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with _whole(file) as partial:
        partial.write_bytes(content)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A place to write to, which takes that of `file` once it is on the disk."""
    partial = file.with_name(f".{file.name}.partial")
    yield partial
    with partial.open("rb+") as stream:
        os.fsync(stream.fileno())
    partial.replace(file)
