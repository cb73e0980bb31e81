"""The edits that a method may return, and the architecture that they lead to.

Edits speak of the model as it was: names, layers and positions before any cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from prune_export.arch import Arch
from prune_export.errors import PlanError, did_you_mean

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Keep:
    """Keep only `index` (ascending) of an axis such as `mlp.3`, in every tensor that uses it."""

    axis: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class Drop:
    """Remove whole blocks; those left are renumbered."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Overwrite:
    """Replace a tensor's values; `value` is called when the tensor is written, and then freed.

    The value has the tensor's old shape and dtype; a `Keep` cuts it as it would the old values.
    """

    tensor: str
    value: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Untie:
    """Store a tied tensor on its own: a copy of what it was tied to, or what `Overwrite` brings."""

    tensor: str


@dataclass(frozen=True)
class Become:
    """Change the model type to one with more tensors; each new one needs an `Overwrite`."""

    model_type: str


Edit = Keep | Drop | Overwrite | Untie | Become


@dataclass(frozen=True)
class Edits:
    """Edits sorted by kind and checked against the model that they speak of."""

    drop: frozenset[int] = frozenset()
    keep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    overwrite: Mapping[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    untie: tuple[str, ...] = ()
    become: str | None = None

    @staticmethod
    def of(edits: Iterable[Edit], arch: Arch) -> Edits:
        """Sorts and checks; an iterator is exhausted, the values of `Overwrite` stay uncalled.

        Raises:
            PlanError: an edit names what is not there, what another edit removes, or comes twice.
        """
        drop: set[int] = set()
        keep: dict[str, tuple[int, ...]] = {}
        overwrite: dict[str, Callable[[], torch.Tensor]] = {}
        given = list(edits)
        source, become = arch, None
        for edit in given:
            if isinstance(edit, Become):
                become = edit.model_type
                arch = source.become(become)
        untie = tuple(dict.fromkeys(edit.tensor for edit in given if isinstance(edit, Untie)))
        for edit in given:
            match edit:
                case Drop(layers):
                    drop |= set(layers)
                case Keep(axis, index):
                    _check_keep(axis, index, arch, keep)
                    keep[axis] = index
                case Overwrite(name, value):
                    _check_overwrite(name, arch, overwrite, untie)
                    overwrite[name] = value
                case Untie(name):
                    arch.with_own(name)
                case Become():
                    pass
        gone = sorted(axis for axis in keep if _layer(axis) in drop)
        gone += [name for name in overwrite if arch.by_name[name].layer in drop]
        if gone:
            raise PlanError(gone[0], "is edited, but its block is dropped", "do one or the other")
        for name in arch.by_name.keys() - source.by_name.keys() - overwrite.keys():
            if arch.by_name[name].layer not in drop:
                raise PlanError(name, "is new, and nothing says what it is", "add an Overwrite")
        return Edits(frozenset(drop), keep, overwrite, untie, become)

    def whole(self, arch: Arch) -> Arch:
        """The architecture before any cut, of the type that it will be."""
        return arch.become(self.become) if self.become else arch

    def after(self, arch: Arch) -> Arch:
        """The architecture that these edits leave of `arch`.

        Raises:
            PlanError: the family cannot be cut in this way.
        """
        kept = arch.kept(self.drop)
        cut = self.whole(arch)
        cut = cut.without(self.drop) if self.drop else cut
        for name in self.untie:
            cut = cut.with_own(name)
        sizes = {}
        for axis, index in self.keep.items():
            name, *numbers = axis.split(".")
            if len(numbers) > 1 and (experts := self.keep.get(f"expert.{numbers[0]}")):
                if int(numbers[1]) not in experts:
                    continue
                numbers[1] = str(experts.index(int(numbers[1])))
            if numbers:
                numbers[0] = str(kept.index(int(numbers[0])))
            sizes[".".join((name, *numbers))] = len(index)
        if sizes:
            cut = cut.with_sizes(sizes)
        return cut


def _check_keep(
    axis: str, index: tuple[int, ...], arch: Arch, keep: Mapping[str, tuple[int, ...]]
) -> None:
    if axis not in arch.sizes:
        raise PlanError(
            f"axis {axis}", "is not an axis of this model", did_you_mean(axis, arch.sizes)
        )
    if axis in keep:
        raise PlanError(f"axis {axis}", "is cut by two edits", "keep one index of each axis")
    size = arch.sizes[axis]
    ascending = all(a < b for a, b in pairwise(index))
    if not index or not ascending or index[0] < 0 or index[-1] >= size:
        raise PlanError(
            f"axis {axis}",
            f"got an index of {len(index)} positions {str(list(index[:8]))[:-1]}"
            f"{', …' if len(index) > 8 else ''}], expected ascending positions below {size}",
        )


def _check_overwrite(
    name: str, arch: Arch, overwrite: Mapping[str, Any], untie: Collection[str]
) -> None:
    if name not in arch.by_name:
        raise PlanError(name, "is not a tensor of this model", did_you_mean(name, arch.by_name))
    tied = arch.by_name[name].tied_to
    if tied is not None and name not in untie:
        raise PlanError(name, f"is tied to {tied} and not stored", f"overwrite {tied} instead")
    if name in overwrite:
        raise PlanError(name, "is overwritten twice", "yield one Overwrite a tensor")


def _layer(axis: str) -> int | None:
    _, *numbers = axis.split(".")
    return int(numbers[0]) if numbers else None
