"""Channel permutations that leave a block's function unchanged, for a better N:M mask.

What a gate and an up row make is read by one column of down, and what a value row makes by one
column of o for each query head that shares it. So these rows and columns may change places together
and the model computes the same: no gather at run time. Not so the inputs of q, k, v, gate and up,
which all of the network shares, nor queries and keys, which positions are turned into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any, Final

import torch

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import OUTPUT_PROJECTIONS, role, roles
from prune_export.calibrate import as_matrix
from prune_export.pruning.sparse import permutation
from prune_export.pruning.sparse.masks import Amount, Compare, digest, mask_of
from prune_export.sparsity.nm import Nm
from prune_export.surgery import Overwrite

Moves = dict[str, tuple[int, list[int]]]
"""By stored name: a dimension, and where each of its new places' values stood."""

_MLP: Final = frozenset(roles(lambda own: own.part == "mlp" and own.group, biases=True))


@dataclass(frozen=True)
class Channels:
    """The inputs of a matrix that may be permuted.

    `places` int64 `[blocks, copies, width]` are its inputs: they move inside their block, and
    alike in all copies (the query heads that share a value).
    """

    arch: Arch
    tensor: Tensor
    places: torch.Tensor

    def columns(self, order: torch.Tensor) -> torch.Tensor:
        """The old place of each input, int64 `[in]`, by an order `[blocks, width]`."""
        moved = torch.take_along_dim(self.places, order[:, None].cpu(), 2)
        found = torch.empty(self.places.numel(), dtype=torch.int64)
        found[self.places.flatten()] = moved.flatten()
        return found

    def best(self, scores: torch.Tensor, nm: Nm) -> torch.Tensor:
        """Finds an order `[blocks, width]` in which a pattern keeps much of `[out, in]` scores."""
        blocks, copies, width = self.places.shape
        placed = scores[:, self.places.to(scores.device)]  # [out, blocks, copies, width]
        placed = placed.permute(1, 2, 0, 3).reshape(blocks, copies * len(scores), width)
        return permutation.grouped(placed, nm)

    def moves(self, order: torch.Tensor) -> Moves:
        """The permutation of each tensor that an order `[blocks, width]` concerns."""
        axis = _input_axes(self.tensor)
        if len(axis) == 1:
            sizes = self.arch.sizes
            return {
                tensor.name: tensor.dims.kept(axis[0], order[0].tolist(), sizes)[0]
                for tensor in self.arch.using(axis[0])
            }
        columns = self.columns(order).tolist()
        found: Moves = {self.tensor.name: (self.tensor.dims.of.index((axis,)), columns)}
        for tensor in _values(self.arch, self.tensor):
            found[tensor.name] = _value_rows(tensor, axis, order.tolist(), self.arch.sizes)
        return found


def free(arch: Arch, tensor: Tensor, nm: Nm) -> Channels | None:
    """The channels of a matrix's inputs that may be permuted, or None."""
    if tensor.role not in OUTPUT_PROJECTIONS:
        return None
    axes = _input_axes(tensor)
    sizes = [arch.sizes[axis] for axis in axes]
    if sizes[-1] % nm.of:
        return None
    if role(tensor.role).part == "mlp":
        if len(axes) != 1 or any(one.role not in _MLP for one in arch.using(axes[0])):
            return None
        return Channels(arch, tensor, torch.arange(sizes[0]).view(1, 1, -1))
    others = any(role(one.role).part != "attention" for one in arch.using(axes[0]))
    gated = any(one.role == "q" and _is_gated(one) for one in arch.block(tensor.layer or 0))
    if (
        others
        or gated
        or not _values(arch, tensor)
        or _base(axes[0]) != "kv"
        or _base(axes[-1]) != "dim"
    ):
        return None
    return Channels(arch, tensor, torch.arange(prod(sizes)).view(sizes[0], -1, sizes[-1]))


def mask(
    channels: Channels | None, scores: torch.Tensor, amount: Amount, compare: Compare
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The mask `[out, in]`, True where a weight is kept, in today's order; and the new order.

    In that order, which is JSON, the zeros are in the pattern.
    """
    if channels is None or not isinstance(amount, Nm):
        return mask_of(scores, amount, compare), {}
    order = channels.best(scores, amount)
    columns = channels.columns(order).to(scores.device)
    found = mask_in(columns, scores, amount, compare)
    return found, noted(order, scores, columns, amount)


def mask_in(
    columns: torch.Tensor | None, scores: torch.Tensor, amount: Amount, compare: Compare
) -> torch.Tensor:
    """The mask for inputs in the order `columns`, if given, as they stand today."""
    if columns is None:
        return mask_of(scores, amount, compare)
    found = torch.empty_like(scores, dtype=torch.bool)
    found[:, columns] = mask_of(scores[:, columns], amount, compare)
    return found


def noted(
    order: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor, nm: Nm
) -> dict[str, Any]:
    """Describes an order as JSON, with the share of scores that is kept before and after."""
    whole = float(scores.sum(dtype=torch.float64)) or 1.0
    return {
        "order": order.tolist(),
        "kept_before": permutation.kept(scores, nm) / whole,
        "kept_after": permutation.kept(scores, nm, columns) / whole,
    }


def placed(
    channels: Mapping[str, Channels],
    orders: Mapping[str, Any],
    edits: Iterable[Overwrite],
    tensors: Mapping[str, Any],
    read: Callable[[str], torch.Tensor],
) -> tuple[tuple[Overwrite, ...], dict[str, Any], dict[str, Any]]:
    """Applies the noted orders to edits and summaries; gives these and JSON about the gain.

    `read` gives the tensors that move and that no edit has yet.
    """
    moves: Moves = {}
    for name, own in orders.items():
        moves.update(channels[name].moves(torch.tensor(own["order"])))
    made = moved(edits, moves, read)
    logs = {name: dict(own) for name, own in tensors.items()}
    (arch, *_) = (one.arch for one in channels.values())
    for edit in made:
        if edit.tensor in moves and edit.tensor in logs:
            kept = as_matrix(arch.by_name[edit.tensor], edit.value()) != 0
            logs[edit.tensor]["digest"] = digest(kept)
    shares = ("kept_before", "kept_after")
    gains = {name: {share: own[share] for share in shares} for name, own in orders.items()}
    means = {share: sum(own[share] for own in gains.values()) / len(gains) for share in shares}
    return made, logs, {"matrices": len(gains), **means, "by_matrix": gains}


def moved(
    edits: Iterable[Overwrite], moves: Moves, read: Callable[[str], torch.Tensor]
) -> tuple[Overwrite, ...]:
    """Applies permutations of rows and columns to the edits."""
    values: dict[str, Callable[[], torch.Tensor]] = {edit.tensor: edit.value for edit in edits}
    for name, move in moves.items():
        values[name] = partial(_moved, values.get(name) or partial(read, name), *move)
    return tuple(Overwrite(name, value) for name, value in values.items())


def _moved(value: Callable[[], torch.Tensor], dim: int, positions: list[int]) -> torch.Tensor:
    return value().index_select(dim, torch.tensor(positions))


def _input_axes(tensor: Tensor) -> tuple[str, ...]:
    """The axes of a matrix's input, outermost first: `mlp.3`, or `kv.3 group.3 dim`."""
    for dim in tensor.dims.of:
        if dim != (("residual",),):
            return dim[0]
    return ("residual",)


def _base(axis: str) -> str:
    return axis.partition(".")[0]


def _is_gated(queries: Tensor) -> bool:
    """Whether queries come with a gate for each channel of their head, which would have to move."""
    return any(axis == "2" for dim in queries.dims.of for part in dim for axis in part)


def _values(arch: Arch, o: Tensor) -> tuple[Tensor, ...]:
    """The tensors of o's block that have value rows."""
    assert o.layer is not None
    return tuple(tensor for tensor in arch.block(o.layer) if role(tensor.role).values)


def _value_rows(
    tensor: Tensor, axes: tuple[str, ...], order: list[list[int]], sizes: Mapping[str, int]
) -> tuple[int, list[int]]:
    """The permutation of a tensor's value rows, of `axes` kv … dim; its other rows stay."""
    heads, width = axes[0], axes[-1]
    dim = next(at for at, one in enumerate(tensor.dims.of) if any(heads in part for part in one))
    parts = tensor.dims.of[dim]
    counts = [prod(_size(axis, sizes) for axis in part) for part in parts]
    positions = list(range(sum(counts)))
    # Queries, keys, values: the last part, or the last of three.
    start, part = sum(counts[:-1]), parts[-1]
    steps = [prod(_size(axis, sizes) for axis in part[at + 1 :]) for at in range(len(part))]
    fixed = sum(2 * step for axis, step in zip(part, steps, strict=True) if axis == "3")
    by_axis = dict(zip(part, steps, strict=True))
    for head, channel in product(range(sizes[heads]), range(sizes[width])):
        base = start + fixed + head * by_axis[heads]
        positions[base + channel * by_axis[width]] = base + order[head][channel] * by_axis[width]
    return dim, positions


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    return int(axis) if axis.isdecimal() else sizes[axis]


def of_all(arch: Arch, tensors: Iterable[Tensor], nm: Nm) -> dict[str, Channels]:
    """The free channels of those matrices that have some."""
    return dict(_of_all(arch, tensors, nm))


def _of_all(arch: Arch, tensors: Iterable[Tensor], nm: Nm) -> Iterator[tuple[str, Channels]]:
    for tensor in tensors:
        found = free(arch, tensor, nm)
        if found is not None:
            yield tensor.name, found
