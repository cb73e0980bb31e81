"""What every calibration pass does first: checks its windows, chooses dtype, folder and batches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.streaming.block_loader import threads
from prune_export.calibrate.streaming.checkpointing import pass_key
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.system.temporary import Temporary

BATCH_TOKENS: Final[Mapping[str, int]] = {"cpu": 2048, "cuda": 16384}
"""Tokens that go through a block at once: enough for full speed, little to hold."""

_BLOCKS_HELD: Final = 3
"""Blocks whose weights a pass holds at most: the one that computes, and the next being read."""


@dataclass(frozen=True)
class PassDriver:
    """A model and the calibration windows that pass through it; `dtype` is what it computes in."""

    checkpoint: Checkpoint
    arch: Arch
    context: CalibrationContext
    dtype: torch.dtype

    @staticmethod
    def of(
        checkpoint: Checkpoint,
        context: CalibrationContext,
        arch: Arch | None = None,
        dtype: torch.dtype | None = None,
    ) -> PassDriver:
        """Makes the driver of a pass over `context.tokens`, by default in `compute_dtype`.

        Raises:
            PlanError: windows are longer than the model's positions, or hold ids it doesn't know.
        """
        arch = arch or checkpoint.arch()
        check(arch, context.tokens)
        dtype = dtype or compute_dtype(checkpoint, context.machine)
        return PassDriver(checkpoint, arch, context, dtype)

    @property
    def ids(self) -> torch.Tensor:
        """The calibration windows, int64 `[samples, length]`."""
        return self.context.tokens.ids

    @property
    def device(self) -> str:
        """Where blocks are computed."""
        return self.context.machine.device

    def batch(self, length: int | None = None) -> int:
        """How many windows of `length` tokens, by default their own, go through a block at once."""
        return batch_windows(self.device, length or self.context.tokens.length)

    def layerwise(self) -> LayerwiseModel:
        """Builds the model, with no block loaded."""
        return LayerwiseModel(self.checkpoint, self.arch, dtype=self.dtype, device=self.device)

    def folder(self, name: str, *own: Any) -> PassFolder:
        """Makes the directory of the pass; `own` is JSON of what distinguishes it from others."""
        tokens, machine = self.context.tokens, self.context.machine
        key = pass_key(self.checkpoint, self.arch, tokens, machine, *own)
        return PassFolder(self.context.scratch, f"{name}-{key}")

    @contextmanager
    def computing(self, *, gradients: bool = False) -> Iterator[None]:
        """Sets torch's threads inside a `with`, and that no gradient is recorded unasked.

        With `gradients`, they may be asked for; else tensors are in inference mode.
        """
        mode = torch.no_grad() if gradients else torch.inference_mode()
        with threads(self.context.machine.threads), mode:
            yield

    def free_ram_bytes(self) -> int:
        """Memory that is left for hidden states beside the blocks that are held."""
        used = psutil.Process().memory_info().rss
        blocks = _BLOCKS_HELD * block_bytes(self.arch, torch.float32)
        return int(self.context.machine.ram_bytes - used - blocks)

    def free_gpu_bytes(self) -> int:
        """The same of half of the GPU's memory; 0 on a CPU."""
        if self.device != "cuda":
            return 0
        blocks = _BLOCKS_HELD * block_bytes(self.arch, self.dtype)
        return self.context.machine.gpu_bytes // 2 - blocks

    def place_of(self, states_bytes: int) -> str | None:
        """The device whose memory holds a pass's states; None: they are kept in files."""
        if self.device == "cuda" and states_bytes <= self.free_gpu_bytes() // 2:
            return "cuda"
        return "cpu" if states_bytes <= self.free_ram_bytes() // 2 else None


class PassFolder:
    """The directory of one pass, below `scratch`; without that, one that is removed when closed."""

    def __init__(self, scratch: Path | None, name: str) -> None:
        self._temporary = Temporary() if scratch is None else None
        self.path = (scratch or Path(self._temporary.path if self._temporary else "")) / name

    def live_as_long_as(self, result: object) -> None:
        """Keeps a temporary directory until `result`, which reads its files, is collected."""
        if self._temporary is not None:
            weakref.finalize(result, self._temporary.close)

    def close(self) -> None:
        """Removes the directory if it is temporary."""
        if self._temporary is not None:
            self._temporary.close()


def batch_windows(device: str, length: int) -> int:
    """How many windows go through a block at once; where they are grouped so, bits are the same."""
    return max(1, BATCH_TOKENS[device] // length)


def batches(stop: int, size: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """Yields the first and last row (exclusive) of each batch of `size` rows or fewer."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def check(arch: Arch, tokens: TokenSet) -> None:
    """Refuses windows that do not fit the model.

    Raises:
        PlanError: they are longer than its positions, or hold ids that it does not know.
    """
    positions = arch.config.get("max_position_embeddings") or arch.config.get("n_positions")
    if positions and tokens.length > int(positions):
        raise PlanError(
            "data  length",
            f"got {tokens.length}, but the model has {positions} positions",
            f"write `length: {positions}` or less",
        )
    refuse_unknown(arch, tokens)


def refuse_unknown(arch: Arch, tokens: TokenSet) -> None:
    """Refuses tokens for which the model has no embedding.

    Raises:
        PlanError: there is one.
    """
    last = int(tokens.ids.max()) if tokens.ids.numel() else -1
    if last >= arch.sizes["vocab"]:
        raise PlanError(
            "data",
            f"holds token id {last}, but the model knows {arch.sizes['vocab']} ids",
            "make the tokens with this model's tokenizer; if a token was added to it, resize the "
            "embedding",
        )


def compute_dtype(checkpoint: Checkpoint, machine: Machine) -> torch.dtype:
    """Chooses the dtype that a pass computes in."""
    bfloat16 = machine.device == "cuda" and checkpoint.dtype == "bfloat16"
    return torch.bfloat16 if bfloat16 else torch.float32


def block_bytes(arch: Arch, dtype: torch.dtype) -> int:
    """The size of the largest block in bytes."""
    return max(
        sum(prod(arch.shape(tensor)) for tensor in arch.block(layer)) * dtype.itemsize
        for layer in range(arch.layers)
    )
