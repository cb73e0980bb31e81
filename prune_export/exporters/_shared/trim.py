"""Finds zeroed channels, heads and sub-blocks, which an engine can leave out with equal logits.

Stock classes give every block the same shape, so what a method removed from single blocks is stored
as zeros. The zeros that matter are those in what writes to the residual state: an MLP channel whose
column of the down projection is zero, a head whose columns of the output projection are, and a
whole sub-block whose projection is. They are found in the weights, whoever wrote them.

Heads that share a key/value group can only go in equal numbers from every group that stays; where
one group lost more than another, some of its dead heads are kept. Heads stay, too, where a norm
runs over all of them (OLMo 2). Nothing but whole sub-blocks goes where a projection is sparse
throughout: its zeros may stand in groups, which a cut would shift, and a few dead channels among
them gain nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import OUTPUT_PROJECTIONS, is_expert, role
from prune_export.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

_WRITES: Final[Mapping[str, str]] = {
    name: "expert" if is_expert(name) else str(role(name).part)
    for name in OUTPUT_PROJECTIONS - {"shared.down"}
}
"""Roles of the projections that write to the residual state, and the sub-block that each ends.

Of an expert that all tokens share, zeros stay: its MLP ends no sub-block.
"""

_DENSE: Final = 0.95
"""The least share of weights that are not zero in a matrix that nobody made sparse."""

_CHANNELS: Final = 32  # what weight quantization takes together


@dataclass(frozen=True)
class Trim:
    """The sizes and positions that are left of a model without its zeroed units.

    `keep` are the positions left of axes that shrink (`mlp.3`, `kv.3`, `moe.3.1`), ascending;
    `heads` the query heads left in each group of `keep["kv.3"]`, by layer, equally many in each;
    `dead` the stored names of output projections that are zero altogether, and of their biases
    where these are, too.
    """

    arch: Arch
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    dead: frozenset[str] = frozenset()

    @staticmethod
    def of(checkpoint: Checkpoint) -> Trim:
        """Reads the output projections of all blocks, one at a time."""
        full = checkpoint.full_config()
        # Whoever planned the export has answered for the config's keys.
        arch = Arch.from_config(full, ignore_keys=full.keys())
        keep: dict[str, tuple[int, ...]] = {}
        heads: dict[int, tuple[tuple[int, ...], ...]] = {}
        dead: set[str] = set()
        for tensor in arch.stored():
            if tensor.role not in _WRITES or tensor.name not in checkpoint.entries:
                continue
            alive, axes, sparse = _alive(checkpoint, arch, tensor)
            if not alive.any():
                dead |= {tensor.name, *_zero_bias(checkpoint, arch, tensor)}
            elif not (sparse or alive.all() or _normed(arch, axes[0])):
                live = np.flatnonzero(alive.any(axis=tuple(range(1, alive.ndim))))
                if len(live) < len(alive):
                    keep[axes[0]] = tuple(map(int, live))
                if alive.ndim > 1 and (left := _equal_numbers(alive[live])):
                    assert tensor.layer is not None
                    heads[tensor.layer] = left
        return Trim(arch, keep, heads, frozenset(dead))

    def __bool__(self) -> bool:
        return bool(self.keep or self.heads or self.dead)

    def all_alive(self) -> Trim:
        """A trim that keeps a head, or a few channels, of each sub-block that is all zero."""
        keep, heads = dict(self.keep), dict(self.heads)
        for name in self.dead:
            tensor = self.arch.by_name[name]
            if tensor.role == "down" and tensor.layer is not None:
                channels = min(_CHANNELS, self.arch.sizes[f"mlp.{tensor.layer}"])
                keep[f"mlp.{tensor.layer}"] = tuple(range(channels))
            elif tensor.role == "o" and not _normed(self.arch, f"kv.{tensor.layer}"):
                keep[f"kv.{tensor.layer}"] = (0,)
                if f"group.{tensor.layer}" in self.arch.sizes:
                    heads[int(tensor.layer or 0)] = ((0,),)
        return Trim(self.arch, keep, heads)

    def whole_parts(self) -> Trim:
        """A trim that leaves out whole sub-blocks only."""
        return Trim(self.arch, {}, {}, self.dead)

    def with_all_heads(self) -> Trim:
        """A trim that keeps all heads of the attentions that are not all zero."""
        keep = {axis: index for axis, index in self.keep.items() if not axis.startswith("kv.")}
        return Trim(self.arch, keep, {}, self.dead)

    def size(self, axis: str) -> int:
        """The size that is left of an axis."""
        name, _, layer = axis.partition(".")
        if name == "group" and int(layer) in self.heads:
            return len(self.heads[int(layer)][0])
        return len(self.keep[axis]) if axis in self.keep else self.arch.sizes[axis]

    def shrunk(self) -> frozenset[str]:
        """Names of the axes (`mlp`, `kv`, `group`, `moe`) that are shorter in some block."""
        names = {axis.split(".")[0] for axis in self.keep}
        return frozenset(names | ({"group"} if self.heads else set()))

    def kept(self, name: str) -> tuple[tuple[int, list[int]], ...]:
        """(dimension, positions left) of a stored tensor, for each dimension that shrinks."""
        tensor = self.arch.by_name[name]
        found = []
        for number, dim in enumerate(tensor.dims.of):
            positions: list[int] = []
            start = 0
            for part in dim:
                whole = self._part(part)
                positions += (start + whole).tolist()
                start += self._length(part)
            if len(positions) < start:
                found.append((number, positions))
        return tuple(found)

    def cut(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Cuts a stored tensor's values to what is left."""
        import torch

        for dim, positions in self.kept(name):
            values = values.index_select(dim, torch.tensor(positions))
        return values

    def note(self) -> str:
        """Says for the build record what was left out; empty when nothing was."""
        by_name = self.arch.by_name
        ends = [_WRITES[by_name[name].role] for name in self.dead if by_name[name].role in _WRITES]
        lost = {
            axis: self.arch.sizes[axis] - len(positions) for axis, positions in self.keep.items()
        }
        channels = sum(count for axis, count in lost.items() if axis.startswith(("mlp", "moe")))
        counts = {
            "attention": ends.count("attention"),
            "mlp": ends.count("mlp"),
            "experts": ends.count("expert"),
            "heads": self._heads_lost(),
            "channels": channels,
        }
        said = [f"{count:,} {what}" for what, count in counts.items() if count]
        return f"trimmed: {', '.join(said)}" if said else ""

    def _heads_lost(self) -> int:
        layers = {*self.heads, *(int(a.split(".")[1]) for a in self.keep if a.startswith("kv."))}
        lost = 0
        for layer in layers:
            group = f"group.{layer}"
            groups = self.arch.sizes.get(group, 1), self.size(group) if self._has(group) else 1
            kv = f"kv.{layer}"
            lost += self.arch.sizes[kv] * groups[0] - self.size(kv) * groups[1]
        return lost

    def _has(self, axis: str) -> bool:
        return axis in self.arch.sizes

    def _length(self, part: tuple[str, ...]) -> int:
        return int(np.prod([self._whole(axis) for axis in part]))

    def _whole(self, axis: str) -> int:
        return int(axis) if axis.isdecimal() else self.arch.sizes[axis]

    def _part(self, part: tuple[str, ...]) -> np.ndarray:
        """The positions left of one product of axes."""
        left = np.arange(self._length(part)).reshape([self._whole(axis) for axis in part])
        for at, axis in enumerate(part):
            if axis in self.keep:
                left = left.take(self.keep[axis], axis=at)
        for at, axis in enumerate(part):
            name, _, layer = axis.partition(".")
            if name == "group" and int(layer) in self.heads:
                kv = part.index(f"kv.{layer}")
                chosen = np.asarray(self.heads[int(layer)])  # [groups, heads left]
                shape = [1] * left.ndim
                shape[kv], shape[at] = chosen.shape
                left = np.take_along_axis(left, chosen.reshape(shape), axis=at)
        return left.reshape(-1)


def _alive(
    checkpoint: Checkpoint, arch: Arch, tensor: Tensor
) -> tuple[np.ndarray, list[str], bool]:
    """Finds the inputs of a projection with a non-zero column, `[axis, …]`, and their axes.

    The last says whether what it reads is sparse itself.
    """
    (number,) = (at for at, dim in enumerate(tensor.dims.of) if ("residual",) not in dim)
    (part,) = tensor.dims.of[number]
    read = checkpoint.read(tensor.name) != 0
    over = [at for at in range(read.dim()) if at != number]
    alive = read.any(dim=over[0])
    sparse = bool(read.index_select(number, alive.nonzero()[:, 0]).float().mean() < _DENSE)
    positions = alive.numpy()
    by_axis = positions.reshape([arch.sizes[axis] for axis in part])
    inner = tuple(at for at, axis in enumerate(part) if "." not in axis)  # inside a head
    return np.asarray(by_axis.any(axis=inner)), [axis for axis in part if "." in axis], sparse


def _zero_bias(checkpoint: Checkpoint, arch: Arch, projection: Tensor) -> list[str]:
    return [
        tensor.name
        for tensor in arch.block(projection.layer if projection.layer is not None else -1)
        if tensor.role == f"{projection.role}.bias" and not checkpoint.read(tensor.name).any()
    ]


def _normed(arch: Arch, axis: str) -> bool:
    """Whether a norm runs over the axis, so that no position can be removed alone."""
    return any(tensor.role.startswith("norm") for tensor in arch.using(axis))


def _equal_numbers(alive: np.ndarray) -> tuple[tuple[int, ...], ...]:
    """Chooses the heads to keep of `[groups, heads]`, equally many in each group; empty if all."""
    most = int(alive.sum(axis=1).max())
    if most == alive.shape[1]:
        return ()
    # A stable sort puts the living first, in their order, then the dead, in theirs.
    chosen = np.argsort(~alive, axis=1, kind="stable")[:, :most]
    return tuple(tuple(sorted(map(int, group))) for group in chosen)
