"""Linear groups: the linear layers of a block that share one input, such as q, k and v."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import ROLES, STACKED_ALONE
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint.header import TORCH

LINEAR_GROUPS: Final[Mapping[str, str]] = {
    name: own.group for name, own in ROLES.items() if own.group is not None
}
"""The kind of linear group that each role of a linear layer belongs to."""


@dataclass(frozen=True)
class LinearGroup:
    """The linear layers of one block that share one input, in the order of the family's table.

    Each expert has groups of its own, whose inputs are the tokens that are routed to it.
    """

    layer: int
    kind: str
    tensors: tuple[Tensor, ...]
    expert: int | None = None

    @property
    def name(self) -> str:
        """Its name in logs: `attention.in`, or `experts.in.3`."""
        return self.kind if self.expert is None else f"{self.kind}.{self.expert}"


def linear_groups(arch: Arch, layer: int) -> tuple[LinearGroup, ...]:
    """Lists the linear groups of a block."""
    found: dict[tuple[str, int | None], list[Tensor]] = {}
    for tensor in arch.block(layer):
        if tensor.role in LINEAR_GROUPS:
            found.setdefault((LINEAR_GROUPS[tensor.role], tensor.expert), []).append(tensor)
    return tuple(
        LinearGroup(layer, kind, tuple(tensors), expert)
        for (kind, expert), tensors in found.items()
    )


class Accumulator(Protocol):
    """Accumulates a statistic of a linear group's inputs."""

    def see(self, states: torch.Tensor) -> None:
        """Adds inputs `[samples, length, in]` of whole windows."""


class InputNorms:
    """Accumulates the squared norm of each input channel, float32, as Wanda's score needs it."""

    def __init__(self, width: int, device: str) -> None:
        self._sums = torch.zeros(width, device=device)
        self.samples = 0
        self.tokens = 0

    @property
    def sums(self) -> torch.Tensor:
        """The sums `[in]`; later inputs are added to the same tensor."""
        return self._sums

    def see(self, states: torch.Tensor) -> None:
        rows = states.flatten(0, -2).float()
        # In parts that stay in the cache: 0.3 ns a state, where vecdot down the columns takes 1.
        step = 64 if rows.device.type == "cpu" else 16384
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            self._sums += part.square().sum(0)
        self.samples += states.shape[0]
        self.tokens += rows.shape[0]


class Hessian:
    """Accumulates XᵀX `[in, in]`, float32: half the Hessian of a linear layer's squared error."""

    def __init__(self, width: int, device: str) -> None:
        self._sums = torch.zeros(width, width, device=device)
        self._step = max(96, -(-width // 8))
        self.samples = 0
        self.tokens = 0

    @property
    def sums(self) -> torch.Tensor:
        """The sums `[in, in]`; later inputs are added to the same tensor."""
        for start, stop in self._strips():
            self._sums[stop:, start:stop] = self._sums[start:stop, stop:].T
        return self._sums

    def see(self, states: torch.Tensor) -> None:
        rows = states.flatten(0, -2).float()
        # Strips from the diagonal on: two thirds of the work, as the rest mirrors them.
        for start, stop in self._strips():
            self._sums[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        self.samples += states.shape[0]
        self.tokens += rows.shape[0]

    def _strips(self) -> Iterator[tuple[int, int]]:
        width = len(self._sums)
        for start in range(0, width, self._step):
            yield start, min(start + self._step, width)


def inputs_last(tensor: Tensor) -> bool:
    """Whether a linear layer's matrix is stored `[out, in]`; GPT-2's Conv1D stores `[in, out]`."""
    last = tensor.dims.of[-1] == (("residual",),)
    return last == LINEAR_GROUPS[tensor.role].endswith(".in")


def inputs_of(arch: Arch, tensor: Tensor) -> int:
    """The number of inputs of a linear layer, in whatever layout it is stored."""
    return arch.shape(tensor)[1 if inputs_last(tensor) else 0]


def as_matrix(tensor: Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Turns a stored matrix, or one of its shape, to `[out, in]`; its own inverse."""
    return stored if inputs_last(tensor) else stored.T


def part_of(tensor: Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The slice of a parameter in transformers' model that is one stored matrix.

    Transformers keeps all experts of a block in one, gates (where there are any) above ups.
    """
    if tensor.expert is None:
        return whole
    own = whole[tensor.expert]
    if tensor.role in STACKED_ALONE:
        return own
    half = own.shape[0] // 2
    return own[:half] if tensor.role == "expert.gate" else own[half:]


class Weights:
    """Reads and writes the matrices of a loaded block as `[out, in]`, whatever their layout."""

    def __init__(self, layerwise: LayerwiseModel) -> None:
        self._layerwise = layerwise

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A float32 copy of a matrix, `[out, in]`."""
        return as_matrix(tensor, self._values(tensor)).float().clone()

    def write(self, tensor: Tensor, value: torch.Tensor) -> torch.Tensor:
        """Puts `[out, in]` into the block, rounded as it will be stored; returns what is stored."""
        stored = self._layerwise.checkpoint.entries[tensor.name]
        rounded = as_matrix(tensor, value).contiguous().to(getattr(torch, TORCH[stored.dtype]))
        values = self._values(tensor)
        values.copy_(rounded.to(values.dtype))
        return rounded.cpu()

    def _values(self, tensor: Tensor) -> torch.Tensor:
        module: Any = self._layerwise.module(tensor)
        leaf = self._layerwise.name_in_block(tensor).rpartition(".")[2]
        return part_of(tensor, getattr(module, leaf).data)


def linears(arch: Arch) -> Iterator[Tensor]:
    """Lists every matrix of the blocks that belongs to a linear group."""
    for tensor in arch.tensors:
        if tensor.layer is not None and tensor.role in LINEAR_GROUPS:
            yield tensor
