"""Maps units (channels, heads, experts) to positions in the tensors that hold them.

A unit is a channel of an MLP (`mlp.3`, `moe.3.7`), a query head (`kv.3` and `group.3` together), a
residual channel or an expert. What is said of units is spread over a tensor's positions, and what
is known of a tensor's values is summed up by unit, both by the tensor's dims alone: fused and
transposed layouts need no code of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from prune_export.arch import Arch, Tensor


def unit_axes(arch: Arch, axis: str) -> tuple[str, ...]:
    """The axes whose product counts units; a key-value axis comes with that of its queries."""
    name, _, layer = axis.partition(".")
    group = f"group.{layer}"
    return (axis, group) if name == "kv" and group in arch.sizes else (axis,)


def unit_shape(arch: Arch, axis: str) -> tuple[int, ...]:
    """The shape of an axis' units; heads are `[kv, group]`."""
    return tuple(arch.sizes[one] for one in unit_axes(arch, axis))


def spread(flags: torch.Tensor, tensor: Tensor, axes: Sequence[str], arch: Arch) -> torch.Tensor:
    """Spreads flags of units over the positions of a tensor.

    `flags` is bool of the units' shape along `axes`. Where a tensor knows only some of the axes
    (keys are shared by the queries of a group), a position counts as flagged if any of its units
    is. Positions of a dimension without the axes are all flagged; the result is of the tensor's
    shape, with size 1 in those dimensions.
    """
    shape = [1] * len(tensor.dims.of)
    found = torch.ones(shape, dtype=torch.bool)
    for number, dim in enumerate(tensor.dims.of):
        if not any(axis in part for part in dim for axis in axes):
            continue
        parts = [_spread(flags, part, axes, arch.sizes) for part in dim]
        shape[number] = -1
        found = found & torch.cat(parts).view(shape)
        shape[number] = 1
    return found


def _spread(
    flags: torch.Tensor, part: Sequence[str], axes: Sequence[str], sizes: Mapping[str, int]
) -> torch.Tensor:
    known = [axis for axis in part if axis in axes]
    if not known:
        return torch.ones(_size(part, sizes), dtype=torch.bool)
    lacking = [at for at, axis in enumerate(axes) if axis not in known]
    own = flags.amax(lacking) if lacking else flags
    own = own.permute([[axis for axis in axes if axis in known].index(axis) for axis in known])
    shape = [sizes[axis] if axis in known else 1 for axis in part]
    full = [_size((axis,), sizes) for axis in part]
    return own.reshape(shape).expand(full).flatten()


def summed(
    values: torch.Tensor, tensor: Tensor, axes: Sequence[str], arch: Arch
) -> torch.Tensor | None:
    """Sums the values of a tensor by unit, float64 of the units' shape; None if it has no units.

    What is shared by several units counts for each of them in equal parts.
    """
    for number, dim in enumerate(tensor.dims.of):
        if not any(axis in part for part in dim for axis in axes):
            continue
        others = [other for other in range(values.dim()) if other != number]
        along = values.sum(others, dtype=torch.float64) if others else values.double()
        lengths = [_size(part, arch.sizes) for part in dim]
        total = torch.zeros([arch.sizes[axis] for axis in axes], dtype=torch.float64)
        for part, own in zip(dim, torch.split(along, lengths), strict=True):
            if any(axis in axes for axis in part):
                total += _summed(own.cpu(), part, axes, arch.sizes)
        return total
    return None


def _summed(
    values: torch.Tensor, part: Sequence[str], axes: Sequence[str], sizes: Mapping[str, int]
) -> torch.Tensor:
    shaped = values.view([_size((axis,), sizes) for axis in part])
    gone = [at for at, axis in enumerate(part) if axis not in axes]
    known = [axis for axis in part if axis in axes]
    left = shaped.sum(gone) if gone else shaped
    left = left.permute([known.index(axis) for axis in axes if axis in known])
    shared = prod(sizes[axis] for axis in axes if axis not in known)
    return left.reshape([sizes[axis] if axis in known else 1 for axis in axes]) / shared


def reordered(
    values: torch.Tensor, tensor: Tensor, order: torch.Tensor, layer: int, arch: Arch
) -> torch.Tensor:
    """Reorders the query heads inside each group of a tensor; `order` is `[kv, group]`.

    Head `order[k, g]` of group k comes to the place g.
    """
    axes = (f"kv.{layer}", f"group.{layer}")
    for number, dim in enumerate(tensor.dims.of):
        if not any(axes[1] in part for part in dim):
            continue
        places, start = [], 0
        for part in dim:
            count = _size(part, arch.sizes)
            own = torch.arange(start, start + count)
            if axes[1] in part:
                own = _reordered(own, part, axes, order, arch.sizes)
            places.append(own)
            start += count
        return values.index_select(number, torch.cat(places))
    return values


def _reordered(
    places: torch.Tensor,
    part: Sequence[str],
    axes: tuple[str, str],
    order: torch.Tensor,
    sizes: Mapping[str, int],
) -> torch.Tensor:
    shaped = places.view([_size((axis,), sizes) for axis in part])
    kv, group = part.index(axes[0]), part.index(axes[1])
    front = shaped.movedim((kv, group), (0, 1))
    own = order.view(*order.shape, *[1] * (front.dim() - 2)).expand_as(front)
    return front.gather(1, own).movedim((0, 1), (kv, group)).flatten()


def _size(part: Sequence[str], sizes: Mapping[str, int]) -> int:
    return prod(int(axis) if axis.isdecimal() else sizes[axis] for axis in part)
