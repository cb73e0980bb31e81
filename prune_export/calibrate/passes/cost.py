"""Estimates the memory, disk and FLOPs of a calibration pass from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from prune_export.arch import Arch
from prune_export.calibrate.statistics.api import ExtraPass, Statistic
from prune_export.calibrate.streaming.driver import BATCH_TOKENS, block_bytes
from prune_export.calibrate.streaming.skip import after
from prune_export.machine import Machine

_REPEATED: Final = 2.5
"""Forward passes where nothing is suspended: up to each of four linear groups, and to the end."""


@dataclass(frozen=True)
class PassCost:
    """The peak cost of a pass; `ram_bytes` comes on top of what Python and torch need."""

    ram_bytes: int
    gpu_bytes: int
    disk_bytes: int
    flops: float
    moved_bytes: int
    seconds: float = 0.0


def pass_cost(
    arch: Arch,
    statistics: Sequence[Statistic | ExtraPass],
    samples: int,
    length: int,
    machine: Machine,
) -> PassCost:
    """Estimates the cost of passes over `samples` windows of `length` tokens.

    States count as kept on disk where they exceed half of the memory, and on a GPU in half of its
    memory, if they fit there. All experts count as active.
    """
    dtype = _dtype(arch, machine)
    item, residual, vocab = dtype.itemsize, arch.sizes["residual"], arch.sizes["vocab"]
    block, average = block_bytes(arch, dtype), arch.block_parameters() / arch.layers
    widest = max(size for name, size in arch.sizes.items() if name != "vocab")
    working = 3 * block + BATCH_TOKENS[machine.device] * (4 * widest + 6 * residual) * item
    on_gpu = machine.device == "cuda"
    room = machine.gpu_bytes // 2 - 3 * block if on_gpu else 0
    ram, gpu = working + min(vocab, samples * length) * residual * item, working
    disk, flops, moved, handy = 0, 0.0, arch.parameters() * item, 0
    for statistic in dict.fromkeys(statistics):
        count = min(statistic.samples or samples, samples)
        tokens = min(statistic.length or length, length)
        skipped = () if isinstance(statistic, ExtraPass) else statistic.skipped
        own = statistic.states if isinstance(statistic, ExtraPass) else 1 + len(skipped)
        states = own * count * tokens * residual * item
        ram += (arch.layers + 1) * count * residual * item
        if states <= room:
            room, gpu = room - states, gpu + states
        elif states > machine.ram_bytes // 2:
            disk, moved = disk + 2 * states, moved + 2 * arch.layers * states
        else:
            ram += states
        blocks = arch.layers + sum(after(unit, arch.layers) for unit in skipped)
        forwards = 1.0
        if isinstance(statistic, ExtraPass):
            forwards = statistic.forwards
            ram, disk = ram + statistic.ram_bytes, disk + statistic.disk_bytes
            gpu += statistic.ram_bytes
            dense = statistic.states > 1
            suspended = suspended_bytes(arch, count * tokens, torch.float32, dense)
            if statistic.suspends and ram + suspended <= machine.ram_bytes:
                ram += suspended
            elif statistic.suspends:
                # Each block is computed again up to each of its linear groups instead.
                forwards *= _REPEATED
            handy += statistic.handy_bytes
            moved += int(forwards) * arch.parameters() * item
        each = 2 * average + 2 * tokens * residual
        flops += forwards * count * tokens * blocks * each
        if skipped:
            ram, gpu = ram + 2 * vocab * residual * item, gpu + 2 * vocab * residual * item
            flops += 2.0 * count * tokens * (1 + len(skipped)) * arch.head_parameters()
    ram += min(handy, max(0, machine.ram_bytes // 2 - ram))
    seconds = sum(one.seconds for one in statistics if isinstance(one, ExtraPass))
    return PassCost(ram, gpu if on_gpu else 0, disk, flops, moved, seconds)


def _dtype(arch: Arch, machine: Machine) -> torch.dtype:
    """What a pass computes in: on a GPU bfloat16 where the checkpoint is."""
    narrow = machine.device == "cuda" and arch.config.get("dtype") == "bfloat16"
    return torch.bfloat16 if narrow else torch.float32


def suspended_bytes(arch: Arch, tokens: int, dtype: torch.dtype, dense: bool = False) -> int:
    """The bytes that a sequential pass holds while all windows are suspended inside a block.

    Counted at its widest linear input. With `dense` (beside the dense model's states) also the
    residual stream that the MLP's output will be added to.
    """
    residual, inner = arch.sizes["residual"], arch.sizes["residual"]
    for name, size in arch.sizes.items():
        if name.split(".")[0] == "mlp":
            inner = max(inner, size)
    return tokens * ((5 if dense else 4) * residual + 2 * inner) * dtype.itemsize
