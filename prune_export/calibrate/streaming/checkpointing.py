"""Saves the state of a calibration pass, so that a killed one goes on where it was.

What is in memory is saved under a new generation number; the small file that names the generation
is replaced last, atomically. So there is always exactly one complete state, or none.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine

INTERVAL_SECONDS: Final = 30.0
_SHARE: Final = 20
"""Saving may take up to a 20th of the time."""


class Saves:
    """The saved states of one pass in a directory of its own.

    `layout` names the buffers that are in memory: where less memory is free than when the pass was
    killed, others are, and it starts again.
    """

    def __init__(self, folder: Path) -> None:
        self.layout: tuple[str, ...] = ()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mark = folder / "mark.json"
        self._generation = 0
        self._due = time.monotonic() + INTERVAL_SECONDS

    @property
    def any(self) -> bool:
        """Whether something was saved."""
        return self._generation > 0

    def due(self) -> bool:
        """Whether enough time has passed since the last save for another."""
        return time.monotonic() >= self._due

    def save(
        self, done: int, buffers: Mapping[str, Buffer], state: Mapping[str, torch.Tensor]
    ) -> None:
        """Keeps the state after `done` blocks; `buffers` are those in memory."""
        from safetensors.torch import save_file

        started = time.monotonic()
        new = self._generation + 1
        for name, buffer in buffers.items():
            buffer.save(self._file(name, new))
        save_file(dict(state), self._file("collectors", new))
        mark = {"done": done, "generation": new, "boot": _boot(), "layout": self.layout}
        partial = self._mark.with_suffix(".partial")
        partial.write_text(json.dumps(mark), encoding="utf-8")
        partial.replace(self._mark)
        for old in self.folder.glob(f"*.{self._generation}.saved"):
            old.unlink()
        self._generation = new
        spent = time.monotonic() - started
        self._due = time.monotonic() + max(INTERVAL_SECONDS, _SHARE * spent)

    def done(self) -> int:
        """The number of blocks done at the last save; 0 where there is none to go on from."""
        if not self._mark.exists():
            return 0
        mark = json.loads(self._mark.read_text(encoding="utf-8"))
        if mark["boot"] != _boot():
            # The files were not flushed to the disk: after a power loss they may hold anything.
            return 0
        if tuple(mark["layout"]) != self.layout:
            return 0
        self._generation = int(mark["generation"])
        return int(mark["done"])

    def restore(self, buffers: Mapping[str, Buffer]) -> dict[str, torch.Tensor]:
        """Fills `buffers` from the save that `done` found, and gives the collectors' state."""
        from safetensors.torch import load_file

        for name, buffer in buffers.items():
            buffer.restore(self._file(name, self._generation))
        return dict(load_file(self._file("collectors", self._generation)))

    def _file(self, name: str, generation: int) -> Path:
        return self.folder / f"{name}.{generation}.saved"


def pass_key(
    checkpoint: Checkpoint, arch: Arch, tokens: TokenSet, machine: Machine, *own: Any
) -> str:
    """Hashes all that must be equal for a saved pass to go on; `own` is JSON of the pass itself."""
    files = [file.stat() for file in checkpoint.files]
    parts = [
        json.dumps(dict(checkpoint.config), sort_keys=True, default=str),
        [arch.family, *own],
        [tokens.fingerprint, machine.device, machine.threads, torch.__version__],
        [(stat.st_size, stat.st_mtime_ns) for stat in files],
        [(name, entry.start) for name, entry in checkpoint.entries.items()],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
