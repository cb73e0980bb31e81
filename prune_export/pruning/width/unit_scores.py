"""Sums scores of weights or gradients by the unit (channel, head, expert) that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import LINEAR_GROUPS, Gradients, ModelView, Sums
from prune_export.calibrate.streaming.linear_groups import part_of
from prune_export.pruning.width.unit_layout import summed, unit_axes, unit_shape

Aggregate = Literal["sum", "prod", "max", "first"]

_STACKS: Final = {"expert.in": "up_proj", "expert.down": "down_proj"}
"""In which of transformers' tensors the experts of a block are; gates and ups share one."""


def matrices(arch: Arch, layer: int) -> Iterator[Tensor]:
    """The weight matrices of a block, through which units are coupled, in the table's order."""
    return (tensor for tensor in arch.block(layer) if tensor.role in LINEAR_GROUPS)


def by_unit(
    arch: Arch,
    axes: Collection[str],
    layer: int,
    values: Iterable[tuple[Tensor, torch.Tensor]],
    aggregate: Aggregate = "sum",
) -> dict[str, torch.Tensor]:
    """Scores one block's units, by axis: sums of each matrix, combined by `aggregate`.

    An expert's are those of all of its matrices.
    """
    found: dict[str, list[torch.Tensor]] = {}
    experts = f"expert.{layer}"
    of_experts: dict[str, torch.Tensor] = {}
    for tensor, own in values:
        for axis in axes:
            if axis == experts:
                continue
            sums = summed(own, tensor, unit_axes(arch, axis), arch)
            if sums is not None:
                found.setdefault(axis, []).append(sums)
        if experts in axes and tensor.expert is not None:
            role = of_experts.setdefault(
                tensor.role, torch.zeros(arch.sizes[experts], dtype=torch.float64)
            )
            role[tensor.expert] += float(own.sum(dtype=torch.float64))
    if of_experts:
        found[experts] = list(of_experts.values())
    return {axis: _together(parts, aggregate) for axis, parts in found.items()}


def _together(parts: list[torch.Tensor], aggregate: Aggregate) -> torch.Tensor:
    if aggregate == "first":
        return parts[0].abs()
    # Sums of signed products count by their size.
    stacked = torch.stack(parts).abs()
    if aggregate == "sum":
        return stacked.sum(0)
    return stacked.prod(0) if aggregate == "prod" else stacked.amax(0)


def of_weights(
    model: ModelView, axes: Collection[str], value: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Scores units by their stored weights: the sum of `value` over all weights of a unit."""
    arch = model.arch
    found: dict[str, torch.Tensor] = {}
    for layer in range(arch.layers):
        own = axes_in(axes, layer)
        read = (
            (tensor, value(model.checkpoint.read_finite(tensor.name).float()))
            for tensor in matrices(arch, layer)
        )
        add_block(found, by_unit(arch, own, layer, read))
    return found


def axes_in(axes: Collection[str], layer: int) -> list[str]:
    """Those of `axes` that the tensors of a block have."""
    return [axis for axis in axes if "." not in axis or axis.split(".")[1] == str(layer)]


def add_block(found: dict[str, torch.Tensor], block: Mapping[str, torch.Tensor]) -> None:
    """Adds a block's scores to the total; those of residual channels sum over all blocks."""
    for axis, scores in block.items():
        found[axis] = found[axis] + scores if axis in found else scores


@dataclass(frozen=True)
class UnitReader:
    """A `GradientReader` that reduces a block's gradients to one score a unit.

    `value(weight, sums)` gives what each weight of a matrix counts; `roles` are the matrices that
    are read.
    """

    arch: Arch
    axes: tuple[str, ...]
    key: str
    kinds: tuple[Any, ...]
    value: Callable[[torch.Tensor, Mapping[Any, torch.Tensor]], torch.Tensor]
    roles: frozenset[str] = frozenset(LINEAR_GROUPS)
    aggregate: Aggregate = "sum"

    def wants(self, layer: int, name: str) -> bool:
        """Whether a parameter is one of the matrices that are read; experts are fused in memory."""
        read = list(self._read(layer))
        if any(tensor.expert is not None for tensor in read):
            return name.endswith(("up_proj", "down_proj")) or self._named(name, read)
        return self._named(name, read)

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Computes the block's scores, by axis."""
        values = (
            (tensor, self.value(weight.float(), own))
            for tensor, weight, own in self._parts(layer, sums, parameters)
        )
        axes = axes_in(self.axes, layer)
        found = by_unit(self.arch, axes, layer, values, self.aggregate)
        return {axis: scores.contiguous() for axis, scores in found.items()} | {
            "none": torch.zeros(1)
        }

    def _read(self, layer: int) -> Iterator[Tensor]:
        """The matrices that hold units of the axes, which need gradients."""
        axes = axes_in(self.axes, layer)
        along = {one for axis in axes for one in unit_axes(self.arch, axis)}
        for tensor in matrices(self.arch, layer):
            expert = tensor.expert is not None and f"expert.{layer}" in axes
            if tensor.role in self.roles and (expert or along & tensor.dims.axes()):
                yield tensor

    def _named(self, name: str, tensors: Iterable[Tensor]) -> bool:
        return any(name == _name_in_block(self.arch, tensor) for tensor in tensors)

    def _parts(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[Tensor, torch.Tensor, Mapping[Any, torch.Tensor]]]:
        fused = {name.rpartition(".")[2]: name for name in parameters if "experts" in name}
        for tensor in self._read(layer):
            if tensor.expert is None:
                name = _name_in_block(self.arch, tensor)
                yield tensor, parameters[name], sums[name]
                continue
            # In memory, transformers keeps all experts of a block in one tensor.
            name = fused[_STACKS.get(tensor.role, "gate_up_proj")]
            yield (
                tensor,
                part_of(tensor, parameters[name]),
                {kind: part_of(tensor, one) for kind, one in sums[name].items()},
            )


def of_gradients(found: Gradients, axes: Collection[str]) -> dict[str, torch.Tensor]:
    """Collects the scores that a `UnitReader` kept, of all blocks."""
    scores: dict[str, torch.Tensor] = {}
    for layer in range(found.layers):
        if axes_in(axes, layer):
            own = found.block(layer)
            add_block(scores, {axis: own[axis] for axis in axes if axis in own})
    return scores


def complete(arch: Arch, axes: Iterable[str], scores: Mapping[str, torch.Tensor]) -> None:
    """Checks that every axis has scores of its units' shape.

    Raises:
        RuntimeError: one has not: the table has a role that no score knows.
    """
    for axis in axes:
        if axis not in scores or tuple(scores[axis].shape) != unit_shape(arch, axis):
            raise RuntimeError(f"no scores along {axis}")


def _name_in_block(arch: Arch, tensor: Tensor) -> str:
    return tensor.name.removeprefix(f"{arch.table.on_disk}.{tensor.layer}.")
