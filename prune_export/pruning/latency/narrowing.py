"""ZipLM's cuts of FFN channels and KV groups by OBS, and the error of each possible width.

The FFN channels of each block and its KV groups (each with its query heads) are cut where their
outputs meet the residual states again: in the inputs of `down` and of `o`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import Edited, Hessian, LinearGroup, linear_groups
from prune_export.calibrate.streaming.linear_groups import inputs_last
from prune_export.errors import PlanError
from prune_export.pruning.latency.obs_structured import removed

KIND_OF = {"mlp": "mlp.out", "kv": "attention.out"}
"""For each axis that is cut, the kind of linear group whose inputs it is."""


@dataclass(frozen=True)
class Limits:
    """The allowed widths of a block's axis: `sizes`, descending, the first is the full one.

    Sizes between them are allowed too, where they are multiples of `step`.
    """

    axis: str
    sizes: tuple[int, ...]
    step: int = 1

    @property
    def whole(self) -> int:
        """The size before any cut."""
        return self.sizes[0]

    @property
    def least(self) -> int:
        """The smallest size above zero."""
        return min(size for size in self.sizes if size)


def limits(arch: Arch, multiple_of: int, *, stock: bool = True) -> tuple[Limits, Limits]:
    """The allowed numbers of FFN channels and of KV groups of a block.

    FFN channels go down by a tenth each time, as in the paper, to multiples of `multiple_of` or, in
    a small model, of less. KV groups go one by one, where the model can do without some. `stock`
    keeps to what a stock class can have in all of its blocks; else a block may lose all of either.

    Raises:
        PlanError: a block has no plain MLP or no attention, or blocks differ.
    """
    ffn = _common(arch, "mlp")
    if ffn is None:
        raise PlanError(
            f"model  {arch.family}",
            "has blocks without an MLP of their own, or of different widths",
            "ziplm narrows plain MLPs of one width; for experts choose a method that cuts experts",
        )
    attends = {f"kv.{layer}" in arch.sizes for layer in range(arch.layers)}
    if len(attends) > 1:
        raise PlanError(
            f"model  {arch.family}",
            "has blocks without attention beside others, and ziplm narrows both halves of each",
            "choose a method that cuts MLPs alone: `structured_wanda` or `minitron` with `ffn`",
        )
    step = min(multiple_of, 1 << max(0, (ffn // 8).bit_length() - 1))
    widths, exact = [ffn], float(ffn)
    while True:
        exact *= 0.9
        width = round(exact / step) * step
        if width < step:
            break
        if width < widths[-1]:
            widths.append(width)
    groups = _common(arch, "kv") or 1
    fewer = _fewer_groups(arch, groups, stock=stock)
    none = () if stock else (0,)
    return Limits("mlp", (*widths, *none), step), Limits("kv", (groups, *fewer))


def _common(arch: Arch, axis: str) -> int | None:
    """The size of an axis, which must be the same in every block."""
    found = {arch.sizes.get(f"{axis}.{layer}") for layer in range(arch.layers)}
    return found.pop() if len(found) == 1 else None


def _fewer_groups(arch: Arch, groups: int, *, stock: bool) -> list[int]:
    for tensor in arch.tensors:
        over = {axis.split(".")[0] for axis in tensor.dims.axes()}
        if "norm" in tensor.role and "kv" in over:
            # A norm over all heads together: without some, the others come out longer.
            return []
    if not stock:
        return [*range(groups - 1, -1, -1)]
    found = []
    for count in range(groups - 1, 0, -1):
        try:
            uniform(arch, {"kv": count}).to_config(arch.config)
        except PlanError:
            continue
        found.append(count)
    return found


def uniform(arch: Arch, sizes: Mapping[str, int]) -> Arch:
    """The model's shapes with `sizes` of axes in every block."""
    for axis, size in sizes.items():
        for layer in range(arch.layers):
            if arch.sizes.get(f"{axis}.{layer}", size) != size:
                arch = arch.resized(f"{axis}.{layer}", size)
    return arch


def in_all(arch: Arch, sizes: Mapping[str, int]) -> dict[str, int]:
    """Spells out `sizes` for each block, for the axes that are cut."""
    every = {f"{axis}.{i}": size for axis, size in sizes.items() for i in range(arch.layers)}
    return {axis: size for axis, size in every.items() if size != arch.sizes.get(axis, size)}


def groups_of(arch: Arch, tensor: Tensor, axis: str) -> list[list[int]]:
    """Groups the inputs of `tensor` by the position of an axis that they belong to."""
    found = []
    for number in range(arch.sizes[axis]):
        ((_, positions),) = tensor.dims.kept(axis, [number], arch.sizes)
        found.append(positions)
    return found


def output(arch: Arch, axis: str) -> Tensor:
    """The output projection whose inputs are an axis such as `mlp.3`."""
    name, _, layer = axis.partition(".")
    linears = linear_groups(arch, int(layer))
    return next(group for group in linears if group.kind == KIND_OF[name]).tensors[0]


def input_dim(tensor: Tensor) -> int:
    """The dimension of a stored matrix that holds its inputs."""
    return 1 if inputs_last(tensor) else 0


def _axis_of(group: LinearGroup) -> str | None:
    for name, kind in KIND_OF.items():
        if group.kind == kind:
            return f"{name}.{group.layer}"
    return None


@dataclass(frozen=True)
class Scorer:
    """Scores, without editing: for each axis and width, the relative error of the output."""

    arch: Arch
    levels: Mapping[str, Sequence[int]]
    """What may be left of `mlp` and of `kv`."""

    @property
    def key(self) -> str:
        return json.dumps(["ziplm scores 1", {name: [*of] for name, of in self.levels.items()}])

    def watch(self, group: LinearGroup, width: int, device: str) -> Hessian | None:
        axis = _axis_of(group)
        if axis is None or len(self.levels[axis.split(".")[0]]) < 2:
            return None
        return Hessian(width, device)

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Hessian
    ) -> Edited:
        axis = str(_axis_of(group))
        (tensor,) = group.tensors
        groups = groups_of(self.arch, tensor, axis)
        levels = self.levels[axis.split(".")[0]]
        result = removed(weights[tensor.name], seen.sums, groups, levels, tensor.name)
        return Edited(log={"errors": [result.errors[size] for size in levels]})


@dataclass(frozen=True)
class Narrower:
    """Cuts axes to `sizes`: zeroes inputs of `down` and `o`, and updates other weights by OBS."""

    arch: Arch
    sizes: Mapping[str, int]

    @property
    def key(self) -> str:
        return json.dumps(["ziplm cuts 1", dict(sorted(self.sizes.items()))])

    def watch(self, group: LinearGroup, width: int, device: str) -> Hessian | None:
        return Hessian(width, device) if _axis_of(group) in self.sizes else None

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Hessian
    ) -> Edited:
        axis = str(_axis_of(group))
        (tensor,) = group.tensors
        groups = groups_of(self.arch, tensor, axis)
        result = removed(weights[tensor.name], seen.sums, groups, [self.sizes[axis]], tensor.name)
        log: dict[str, Any] = {"kept": result.kept, "error": result.errors[self.sizes[axis]]}
        return Edited({tensor.name: result.weight}, log)
