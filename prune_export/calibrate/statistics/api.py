"""What a method may ask of a calibration pass, and what gathers it.

A statistic is a frozen, hashable specification; its collector sees the states as they pass. To add
one, write both in a file beside `block_influence.py`; the pass needs no edit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from prune_export.calibrate.streaming.offload import Buffer
from prune_export.calibrate.streaming.skip import Part, Unit

MakeBuffer = Callable[[str, int, tuple[int, ...], torch.dtype], Buffer]


@dataclass(frozen=True)
class Scope:
    """What a collector is made for: `samples` windows of `length` tokens through `layers` blocks.

    `buffer(name, rows, shape, dtype)` gives room for what is too large to hold by right; it is
    kept when the pass is killed and goes on.
    """

    layers: int
    residual: int
    samples: int
    length: int
    buffer: MakeBuffer


class Collector(Protocol):
    """Gathers one statistic."""

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Sees a block's inputs and outputs `[batch, length, residual]` of samples from `start`.

        Outputs are residual states: those of the last block come before the final norm.
        """

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        """Hears mean losses in nats a token; called once, and only where blocks are bypassed."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """Everything it has gathered outside of buffers; the pass saves it."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""

    def result(self) -> Any: ...


@runtime_checkable
class Listener(Collector, Protocol):
    """A collector that also sees what arrives inside of blocks."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of tensors (`norm.mlp`) whose modules' inputs it wants."""

    def arrive(self, layer: int, role: str, states: torch.Tensor) -> None:
        """Sees the inputs `[…, width]` of the module that holds a block's tensor of a role."""


@runtime_checkable
class Stepper(Collector, Protocol):
    """A collector that sees the residual step of one part of each block."""

    @property
    def part(self) -> Part:
        """The part."""

    def step(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Sees residual states `[batch, length, residual]` without and with what the part adds."""


@runtime_checkable
class Reader(Collector, Protocol):
    """A collector that reads what the whole model predicts, and itself keeps what it makes of it.

    It is not saved with the pass: one that is killed reads all predictions again.
    """

    def read(self, sample: int, start: int, logits: torch.Tensor) -> None:
        """Reads logits float32 `[positions, vocab]` of a window from a position on."""


class Statistic(Protocol):
    """A specification of something to gather; equal specifications are gathered once.

    It wants the first `samples` windows, cut to their first `length` tokens; None wants all.
    `bypassed` are the blocks, or parts of blocks, for each of which it wants the loss of the model
    without it.
    """

    @property
    def samples(self) -> int | None: ...
    @property
    def length(self) -> int | None: ...
    @property
    def skipped(self) -> tuple[Unit, ...]: ...
    def __hash__(self) -> int: ...
    def collector(self, scope: Scope) -> Collector: ...


@dataclass(frozen=True)
class ExtraPass:
    """Passes that a method's `decide` asks for itself (`ModelView`), announced for the plan.

    `forwards` are passes of `samples` windows, cut to `length` tokens (None: all of them), through
    the whole model; a backward pass counts as two. `ram_bytes` and `disk_bytes` are what they hold
    beyond the states and blocks of a pass, `handy_bytes` what more where there is room; `parks`
    says that windows wait inside a block (`sweep`); `states` are the arrays of states that it has.
    """

    forwards: float = 1.0
    samples: int | None = None
    length: int | None = None
    ram_bytes: int = 0
    disk_bytes: int = 0
    suspends: bool = False
    seconds: float = 0.0
    handy_bytes: int = 0
    states: int = 1
