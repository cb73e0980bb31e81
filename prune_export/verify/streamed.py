"""Computes losses of a checkpoint that is larger than the memory, one block at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import torch

from prune_export.calibrate.streaming.driver import block_bytes, compute_dtype
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.progress import Task


@torch.inference_mode()
def streamed_losses(
    path: Path,
    ids: np.ndarray,
    machine: Machine,
    task: Task,
    counted: np.ndarray | None = None,
) -> list[float]:
    """Computes each window's mean cross-entropy in nats; `ids` int64 `[windows, length]`.

    Where `counted` bool of that shape is given, the mean is over the tokens that it marks.

    The model is read once for as many windows as their states leave room for, so few and long
    reads are made. On a CPU the computation is in float32, as it is for a model that fits.
    """
    torch.set_num_threads(machine.threads)
    checkpoint = Checkpoint.open(path)
    arch = checkpoint.arch()
    dtype = compute_dtype(checkpoint, machine)
    layerwise = LayerwiseModel(checkpoint, arch, dtype=dtype, device=machine.device)
    window_bytes = ids.shape[1] * arch.sizes["residual"] * dtype.itemsize
    free = machine.ram_bytes - psutil.Process().memory_info().rss - 3 * block_bytes(arch, dtype)
    group = max(1, free // 2 // window_bytes)
    losses: list[float] = []
    for first in range(0, len(ids), group):
        windows = torch.from_numpy(np.ascontiguousarray(ids[first : first + group]))
        some = None if counted is None else torch.from_numpy(counted[first : first + group])
        losses += _of_group(layerwise, windows, some, arch.layers, task)
        task.advance(len(windows) / (arch.layers + 1))
    return losses


def _of_group(
    layerwise: LayerwiseModel,
    windows: torch.Tensor,
    counted: torch.Tensor | None,
    layers: int,
    task: Task,
) -> list[float]:
    layerwise.look_up(windows.flatten())
    calls = layerwise.calls(windows)
    states = torch.stack([layerwise.enter(one[None])[0].cpu() for one in windows])
    layerwise.forget_rows()
    for layer in range(layers):
        layerwise.load(layer, layerwise.read(layerwise.arch.block(layer)))
        for at, one in enumerate(states):
            out = layerwise.run(layer, one[None].to(layerwise.device), calls[layer])
            states[at] = out[0].cpu()
        layerwise.free(layer)
        task.advance(len(windows) / (layers + 1))
    layerwise.load_head()
    if counted is None:
        return [
            layerwise.loss(one[None], own[None]) / (windows.shape[1] - 1)
            for one, own in zip(states, windows, strict=True)
        ]
    return [
        layerwise.loss(one[None], own[None], marks) / int(marks[1:].sum())
        for one, own, marks in zip(states, windows, counted, strict=True)
    ]
