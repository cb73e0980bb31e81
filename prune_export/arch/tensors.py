"""Binds a table's rows to a config: the tensors of a model and the sizes of their axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Final

from prune_export.arch.conditions import holds, value
from prune_export.arch.dims import Dims
from prune_export.arch.table import Table, TensorRow
from prune_export.errors import UnsupportedArch

MOST_EXPERTS: Final = 4_096
"""In a block."""
MOST_OF_A_MODEL: Final = 50_000
"""Experts of all blocks: the largest models known have 31,000, and each takes time to describe."""

parse = lru_cache(maxsize=None)(Dims.parse)


@lru_cache(maxsize=1 << 16)
def _renamed(text: str, names: tuple[tuple[str, str], ...]) -> Dims:
    """Parses dims and renames their axes; cached, as a plan binds hundreds of cuts of a model."""
    return parse(text).renamed(dict(names))


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    `name` is its name on disk; `dims` what its dimensions mean; `role` its part in the block
    (`q`, `down`, `norm.attn`, …); `layer` its block or None; `tied_to` the name of the tensor that
    is stored in its place; `expert` its expert or None.
    """

    name: str
    dims: Dims
    role: str
    layer: int | None = None
    tied_to: str | None = None
    expert: int | None = None

    @property
    def is_buffer(self) -> bool:
        """Whether transformers stores it but trains it never."""
        return self.role.startswith("buffer.")


@dataclass(frozen=True)
class Binding:
    """A table, a config and the sizes that are already known to differ from what it says."""

    table: Table
    config: Mapping[str, Any]
    layers: int
    given: Mapping[str, int]

    def size(self, axis: str) -> int:
        """The size of an axis such as `mlp.3`.

        Raises:
            UnsupportedArch: the config gives none, or one below 1.
        """
        if axis in self.given:
            return self.given[axis]
        expression = self.table.axes[axis.split(".")[0]].said(self.config)
        size = value(expression, self.config)
        if size < 1:
            raise UnsupportedArch("config.json", f"`{expression}` is {size}, expected at least 1")
        return size

    def sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The size of each axis that the tensors have, in the table's order, then by layer."""
        order = {name: number for number, name in enumerate(self.table.axes)}
        axes = {axis for tensor in tensors for axis in tensor.dims.axes()}

        def place(axis: str) -> tuple[int, ...]:
            name, *numbers = axis.split(".")
            return (order[name], *map(int, numbers))

        return {axis: self.size(axis) for axis in sorted(axes, key=place)}

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in the order of the model."""
        yield from (self._outside(row) for row in self.table.head if self._has(row))
        rows = [row for row in self.table.block if self._has(row)]
        sets = {row.layers: self._members(row.layers) for row in rows if row.layers}
        for layer in range(self.layers):
            here = (row for row in rows if not row.layers or layer in sets[row.layers])
            for of_experts, group in groupby(here, key=lambda row: "{expert}" in row.name):
                yield from (self._experts if of_experts else self._plain)(tuple(group), layer)
        yield from (self._outside(row) for row in self.table.tail if self._has(row))

    def _has(self, row: TensorRow) -> bool:
        return holds(row.when, self.config)

    def _members(self, name: str) -> frozenset[int]:
        inside = members(self.table, name.removeprefix("not "), self.config, self.layers)
        return frozenset(range(self.layers)) - inside if name.startswith("not ") else inside

    def _outside(self, row: TensorRow) -> Tensor:
        tied = row.tied_to if row.tied_to and holds(row.tied_when, self.config) else None
        return Tensor(row.name, parse(row.dims), row.role, None, tied)

    def _plain(self, rows: Sequence[TensorRow], layer: int) -> Iterator[Tensor]:
        own = tuple(self._own(layer).items())
        for row in rows:
            name = f"{self.table.on_disk}.{layer}.{row.name}"
            yield Tensor(name, _renamed(row.dims, own), row.role, layer)

    def _experts(self, rows: Sequence[TensorRow], layer: int) -> Iterator[Tensor]:
        own = self._own(layer)
        experts = self.size(own.get("expert", "expert"))
        if experts > MOST_EXPERTS:
            raise UnsupportedArch(
                "config.json", f"got {experts:,} experts a block, expected at most {MOST_EXPERTS:,}"
            )
        if experts * self.layers > MOST_OF_A_MODEL:
            raise UnsupportedArch(
                "config.json",
                f"got {experts:,} experts in each of {self.layers:,} blocks, expected at most "
                f"{MOST_OF_A_MODEL:,} in all",
            )
        for expert in range(experts):
            axes = self.table.axes.items()
            mine = {name: f"{name}.{layer}.{expert}" for name, axis in axes if axis.per_expert}
            names = tuple((own | mine).items())
            for row in rows:
                name = f"{self.table.on_disk}.{layer}.{row.name.replace('{expert}', str(expert))}"
                yield Tensor(name, _renamed(row.dims, names), row.role, layer, None, expert)

    def _own(self, layer: int) -> dict[str, str]:
        axes = self.table.axes.items()
        return {name: f"{name}.{layer}" for name, axis in axes if axis.per_layer}


def members(table: Table, name: str, config: Mapping[str, Any], layers: int) -> frozenset[int]:
    """The layers of a layer set."""
    row = table.layer_sets[name]
    if not holds(row.when, config):
        return frozenset()
    if row.of:
        kinds = config.get(row.of) or ()
        return frozenset(layer for layer, kind in enumerate(kinds) if kind in row.values)
    if row.listed:
        inside = _listed(row.listed, config)
        return frozenset(layer for layer in range(layers) if layer in inside)
    if row.period and row.offset:
        period, offset = value(row.period, config), value(row.offset, config)
        if period < 1:
            raise UnsupportedArch(f"config.json  {row.period}", f"got {period}, expected 1 or more")
        return frozenset(layer for layer in range(layers) if layer % period == offset)
    every = value(f"{row.every or 1} | 1", config)
    if every < 1:
        raise UnsupportedArch(f"config.json  {row.every}", f"got {every}, expected 1 or more")
    first = value(f"{row.first or 0} | 0", config)
    last = value(f"{row.last or layers} | {layers}", config)
    outside = _listed(row.excluding or "", config)
    return frozenset(
        layer
        for layer in range(max(first, 0), min(last + 1, layers))
        if (layer + 1) % every == 0 and layer not in outside
    )


def _listed(key: str, config: Mapping[str, Any]) -> set[int]:
    listed = config.get(key) or ()
    if not isinstance(listed, list | tuple) or any(type(one) is not int for one in listed):
        raise UnsupportedArch(
            f"config.json  {key}", f"got {listed!r:.60}, expected a list of layers"
        )
    return set(listed)
