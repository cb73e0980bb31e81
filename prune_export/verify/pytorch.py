"""Runs a checkpoint in PyTorch eager as a `Runner`: the reference for engines."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch

from prune_export.checkpoint.loading import load_config, load_model
from prune_export.contracts import Runner
from prune_export.errors import MissingExtra
from prune_export.machine import Machine
from prune_export.system.temporary import Temporary

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "stored": "auto",
}


@dataclass(frozen=True)
class PyTorch:
    """Opens a model directory with stock transformers, without remote code and without a network.

    `precision` is the dtype of the computation (`stored`: that of the files); `logits: last` is
    what text generation computes and what timing uses, `all` is what verification needs.
    """

    precision: Literal["float32", "float16", "bfloat16", "stored"] = "float32"
    logits: Literal["all", "last"] = "all"

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens a checkpoint on `machine.device`.

        A model larger than the memory is left on disk and streams through it block by block at
        each step, which accelerate does.

        Raises:
            MissingExtra: it does not fit, and accelerate is not installed.
        """
        return _PyTorchRunner(path, machine, self)


class _PyTorchRunner:
    """Runs a transformers model step by step: a `contracts.Runner`."""

    def __init__(self, path: Path, machine: Machine, how: PyTorch) -> None:
        torch.set_num_threads(machine.threads)
        dtype: Any = _DTYPES[how.precision]
        self._closing = ExitStack()
        with ExitStack() as stack:
            fits = fits_in_memory(path, machine, dtype)
            placement = {} if fits else _offload(path, machine, stack)
            model = load_model(path, dtype=dtype, **placement).eval()
            self._closing = stack.pop_all()
        self._model = model.to(machine.device) if fits else model
        self._device = machine.device
        self._keep = {"logits_to_keep": 1} if how.logits == "last" else {}
        self._cache: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._cache = None
        del self._model
        self._closing.close()

    def reset(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        # The copy in and the synchronisation belong to a step; the logits' way back does not.
        tokens = torch.from_numpy(np.ascontiguousarray(ids)).to(self._device)
        output = self._model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, **self._keep
        )
        if self._device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self._cache = output.past_key_values
        return output.logits.float().cpu().numpy(), seconds


def stored_bytes(path: Path) -> int:
    """Sums the bytes of a model directory's safetensors files."""
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def fits_in_memory(path: Path, machine: Machine, dtype: Any = torch.float32) -> bool:
    """Whether the weights in `dtype` leave a fifth of the memory for activations and the cache."""
    stored = stored_bytes(path)
    # 16-bit files double in float32.
    needed = 2 * stored if dtype == torch.float32 and not _stored_as_float32(path) else stored
    budget = machine.gpu_bytes if machine.device == "cuda" else machine.ram_bytes
    return needed <= 0.8 * budget


def _stored_as_float32(path: Path) -> bool:
    return bool(load_config(path).dtype == torch.float32)


def _offload(path: Path, machine: Machine, stack: ExitStack) -> dict[str, Any]:
    """Makes arguments of from_pretrained that offload to disk what does not fit."""
    import importlib.util

    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra.of(
            f"opening {path}, which is larger than the memory", "accelerate", "heal"
        )
    memory: dict[Any, int] = {"cpu": int(0.5 * machine.ram_bytes)}
    if machine.device == "cuda":
        memory[0] = int(0.7 * machine.gpu_bytes)
    return {
        "device_map": "auto",
        "max_memory": memory,
        "offload_buffers": True,
        "offload_folder": stack.enter_context(Temporary()),
    }
