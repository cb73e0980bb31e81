"""The interface of activation statistics: `Statistic` says what is wanted, `Collector` gathers it.

A statistic is a frozen, hashable specification. It makes a collector, which is given every block's
inputs and outputs in one forward pass over the calibration windows. To add one, write both in a
file beside `block_influence.py`; the pass needs no edit.
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
    """The shape of a pass: `samples` windows of `length` tokens through `layers` blocks.

    `buffer(name, rows, shape, dtype)` makes a large array, in memory or in a file; it is kept when
    the pass is killed and goes on.
    """

    layers: int
    residual: int
    samples: int
    length: int
    buffer: MakeBuffer


class Collector(Protocol):
    """Accumulates one statistic while the calibration windows pass through the model."""

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Adds a block's inputs and outputs `[batch, length, residual]` of samples from `start` on.

        Outputs are residual states: those of the last block come before the final norm.
        """

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        """Takes the mean losses in nats a token; called once, and only where blocks are skipped."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """Everything gathered outside of buffers; the pass saves it."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state` gave."""

    def result(self) -> Any: ...


@runtime_checkable
class Listener(Collector, Protocol):
    """A collector that also gets the inputs of modules inside blocks."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The modules it wants, by the roles of their tensors (such as `norm.mlp`)."""

    def arrive(self, layer: int, role: str, states: torch.Tensor) -> None:
        """Adds the inputs `[…, width]` of the module of a block that holds the tensor of a role."""


@runtime_checkable
class Stepper(Collector, Protocol):
    """A collector of what one part (attention or MLP) of each block adds to the residual stream."""

    @property
    def part(self) -> Part:
        """The part: `attention` or `mlp`."""

    def step(self, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Adds residual states `[batch, length, residual]` before and after the part's output."""


@runtime_checkable
class Reader(Collector, Protocol):
    """A collector that reads what the whole model predicts, and itself keeps what it makes of it.

    It is not saved with the pass: one that is killed reads all predictions again.
    """

    def read(self, sample: int, start: int, logits: torch.Tensor) -> None:
        """Reads logits float32 `[positions, vocab]` of a window from a position on."""


class Statistic(Protocol):
    """What a method wants of a calibration pass; equal specifications are gathered once.

    It wants the first `samples` windows, cut to their first `length` tokens; None wants all.
    `skipped` are the blocks, or parts of blocks, for each of which it wants the loss of the model
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
    """Further passes that a method makes while it decides, announced so that `plan` counts them.

    `forwards` are passes of `samples` windows, cut to `length` tokens (None: all of them), through
    the whole model; a backward pass counts as two. `ram_bytes` and `disk_bytes` are what they hold
    beyond the states and blocks of a pass, `handy_bytes` what more where there is room; `suspends`
    says that windows are suspended inside a block (`sequential`); `states` is the number of arrays
    of hidden states that it holds.
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
