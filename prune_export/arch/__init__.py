"""What a model looks like: a family's table bound to one config. No torch, no disk.

`Arch.from_config` answers every question about shapes before a weight is read: which tensors there
are, what each dimension means, what a cut leaves, and how the config must say it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

from prune_export.arch.dims import Dims
from prune_export.arch.table import Table, TensorRow, common_keys, holds, table_for, value
from prune_export.errors import PlanError, UnsupportedArch, did_you_mean

__all__ = ["Arch", "Dims", "Tensor"]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    `name` is its name on disk; `dims` what its dimensions mean; `role` its part in the block
    (`q`, `down`, `norm.attn`, …); `layer` its block or None; `tied_to` the name of the tensor that
    is stored in its place.
    """

    name: str
    dims: Dims
    role: str
    layer: int | None = None
    tied_to: str | None = None


@dataclass(frozen=True)
class Arch:
    """A family's table bound to one config.

    `sizes` has an entry an axis (`residual`), and for axes that may differ by layer an entry a
    layer (`mlp.3`). `tensors` are in the order of the model.
    """

    family: str
    sizes: Mapping[str, int]
    layers: int
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    table: Table

    @staticmethod
    def from_config(config: Mapping[str, Any], *, ignore_keys: Collection[str] = ()) -> Arch:
        """Binds the table of `config["model_type"]`.

        `config` is a full transformers config as a dict (defaults filled in), `ignore_keys` are
        keys that the caller answers for.

        Raises:
            UnsupportedArch: no table, a key or a value that the table does not know.
        """
        table = table_for(str(config.get("model_type")))
        _refuse_unknown(table, config, ignore_keys)
        layers = value(table.layers, config)
        sizes: dict[str, int] = {}
        for name, axis in table.axes.items():
            if not _used(name, table, config):
                continue
            size = value(axis.size, config)
            sizes |= (
                {f"{name}.{i}": size for i in range(layers)} if axis.per_layer else {name: size}
            )
        tensors = tuple(_tensors(table, config, layers, sizes))
        return Arch(
            table.family,
            MappingProxyType(sizes),
            layers,
            tensors,
            MappingProxyType(dict(config)),
            table,
        )

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """The tensors by stored name."""
        return MappingProxyType({tensor.name: tensor for tensor in self.tensors})

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that a checkpoint holds: all but those tied to another."""
        return tuple(tensor for tensor in self.tensors if tensor.tied_to is None)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape."""
        return tensor.dims.shape(self.sizes)

    def parameters(self) -> int:
        """The number of stored parameters; tied tensors count once."""
        return sum(prod(self.shape(tensor)) for tensor in self.stored())

    def block(self, layer: int) -> tuple[Tensor, ...]:
        """The tensors of one block."""
        return tuple(tensor for tensor in self.tensors if tensor.layer == layer)

    def using(self, axis: str) -> tuple[Tensor, ...]:
        """Every tensor that a cut along `axis` (such as `kv.3` or `residual`) must touch."""
        return tuple(tensor for tensor in self.tensors if axis in tensor.dims.axes())

    def resized(self, axis: str, size: int) -> Arch:
        """The same model with one axis of another size.

        Raises:
            PlanError: there is no such axis, or it would be empty.
        """
        if axis not in self.sizes:
            raise PlanError(
                f"axis {axis}", "is not an axis of this model", did_you_mean(axis, self.sizes)
            )
        if size < 1:
            raise PlanError(f"axis {axis}", f"got size {size}, expected at least 1")
        return replace(self, sizes=MappingProxyType({**self.sizes, axis: size}))

    def without(self, layers: Collection[int]) -> Arch:
        """The same model without some blocks; those left are renumbered from 0.

        Raises:
            PlanError: a layer does not exist, none would be left, or the family computes with the
                layer's number.
        """
        kept = self.kept(layers)
        for key, wanted in self.table.config.depth_requires.items():
            if self.config.get(key, wanted) != wanted:
                raise PlanError(
                    f"config.json  {key}",
                    f"is {self.config[key]!r}: each block computes with its own number, so blocks "
                    "cannot be dropped without changing the others",
                    "choose a width or sparsity method for this model",
                )
        config = _cut_config(self.table, self.config, kept)
        renumber = {old: new for new, old in enumerate(kept)}
        sizes = dict(_renumbered_sizes(self.sizes, self.table, renumber))
        tensors = tuple(_tensors(self.table, config, len(kept), sizes))
        return replace(
            self,
            sizes=MappingProxyType(sizes),
            layers=len(kept),
            tensors=tensors,
            config=MappingProxyType(config),
        )

    def kept(self, layers: Collection[int]) -> tuple[int, ...]:
        """The layers left after dropping `layers`, ascending.

        Raises:
            PlanError: a layer does not exist, or none would be left.
        """
        unknown = sorted(layer for layer in layers if not 0 <= layer < self.layers)
        if unknown:
            raise PlanError(
                "layers", f"got {unknown}, but the model has layers 0 to {self.layers - 1}"
            )
        kept = tuple(layer for layer in range(self.layers) if layer not in set(layers))
        if not kept:
            raise PlanError(
                "layers", f"all {self.layers} blocks would be dropped", "keep at least one"
            )
        return kept

    def origin(self, kept: Sequence[int]) -> Mapping[str, str]:
        """For each stored name of this model cut to `kept`, the name that it has here."""
        prefix = self.table.blocks + "."
        found = {}
        for tensor in self.stored():
            if tensor.layer is None:
                found[tensor.name] = tensor.name
            elif tensor.layer in kept:
                rest = tensor.name.removeprefix(f"{prefix}{tensor.layer}.")
                found[f"{prefix}{kept.index(tensor.layer)}.{rest}"] = tensor.name
        return found

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with every key rewritten that this model's sizes and layers change.

        Raises:
            PlanError: the sizes differ between layers, which a stock config cannot say.
        """
        written = dict(base)
        changed = {
            key: new for key, new in self.config.items() if key in base or base.get(key) != new
        }
        written |= {key: new for key, new in changed.items() if key in _depth_keys(self.table)}
        for name, axis in self.table.axes.items():
            sizes = {size for key, size in self.sizes.items() if key.split(".")[0] == name}
            if len(sizes) > 1:
                raise PlanError(
                    f"axis {name}",
                    f"has sizes {sorted(sizes)} in different layers, "
                    "which a stock config cannot say",
                    "choose uniform sizes",
                )
            if sizes and value(axis.size, written) != next(iter(sizes)):
                key = axis.size.split("|")[0].split("/")[0].strip()
                written[key] = next(iter(sizes))
        return written


def _refuse_unknown(table: Table, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    rules = table.config
    known = {
        *rules.accepts,
        *rules.per_layer,
        *rules.known,
        *rules.depth_requires,
        *common_keys(),
        *_depth_keys(table),
        *ignore,
    }
    for axis in table.axes.values():
        known |= set(axis.size.replace("|", " ").replace("/", " ").replace("*", " ").split())
    for key in config:
        if key not in known:
            raise UnsupportedArch(
                f"config.json  {key}",
                f"the {table.family} table does not know this key (value {config[key]!r:.60})",
                f"if it does not change the computation, pass `--ignore-config-key {key}`",
            )
    for key, accepted in rules.accepts.items():
        if key in config and config[key] not in accepted and key not in ignore:
            raise UnsupportedArch(
                f"config.json  {key}",
                f"got {config[key]!r}, the {table.family} table is true for {accepted}",
            )


def _depth_keys(table: Table) -> set[str]:
    sets = {key for row in table.layer_sets.values() for key in (row.every, row.excluding)}
    return {table.layers, *table.config.per_layer, *sets}


def _used(axis: str, table: Table, config: Mapping[str, Any]) -> bool:
    rows = (*table.head, *table.block, *table.tail)
    return any(
        axis in Dims.parse(row.dims).axes() or f"{{{axis}}}" in row.name
        for row in rows
        if holds(row.when, config)
    )


def _members(name: str, table: Table, config: Mapping[str, Any], layers: int) -> set[int]:
    row = table.layer_sets[name.removeprefix("not ")]
    every = int(config.get(row.every) or 1)
    outside = set(config.get(row.excluding) or ())
    inside = {i for i in range(layers) if (i + 1) % every == 0 and i not in outside}
    return set(range(layers)) - inside if name.startswith("not ") else inside


def _cut_config(table: Table, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    layers = value(table.layers, config)
    cut = dict(config) | {table.layers: len(kept)}
    for key in table.config.per_layer:
        listed = config.get(key)
        if isinstance(listed, list | tuple):
            if len(listed) != layers:
                raise UnsupportedArch(
                    f"config.json  {key}", f"has {len(listed)} entries for {layers} layers"
                )
            cut[key] = [listed[i] for i in kept]
    for name, row in table.layer_sets.items():
        inside = _members(name, table, config, layers)
        cut[row.every] = 1
        cut[row.excluding] = [new for new, old in enumerate(kept) if old not in inside]
    return cut


def _renumbered_sizes(
    sizes: Mapping[str, int], table: Table, renumber: Mapping[int, int]
) -> Iterator[tuple[str, int]]:
    for key, size in sizes.items():
        name, _, layer = key.partition(".")
        if layer and table.axes[name].per_layer:
            if int(layer) in renumber:
                yield f"{name}.{renumber[int(layer)]}", size
        else:
            yield key, size


def _tensors(
    table: Table, config: Mapping[str, Any], layers: int, sizes: Mapping[str, int]
) -> Iterator[Tensor]:
    sets = {
        name: _members(name, table, config, layers)
        for name in {row.layers for row in table.block if row.layers}
    }
    yield from (_bound(row, config) for row in table.head if holds(row.when, config))
    rows = [row for row in table.block if holds(row.when, config)]
    for layer in range(layers):
        own = {name: f"{name}.{layer}" for name, axis in table.axes.items() if axis.per_layer}
        for row in rows:
            if row.layers and layer not in sets[row.layers]:
                continue
            dims = Dims.parse(row.dims).renamed(own)
            experts = "{expert}" in row.name
            count = sizes[own.get("expert", "expert")] if experts else 1
            for expert in range(count):
                name = f"{table.blocks}.{layer}.{row.name.replace('{expert}', str(expert))}"
                yield Tensor(name, dims, row.role, layer)
    yield from (_bound(row, config) for row in table.tail if holds(row.when, config))


def _bound(row: TensorRow, config: Mapping[str, Any]) -> Tensor:
    tied = row.tied_to if row.tied_to and holds(row.tied_when, config) else None
    return Tensor(row.name, Dims.parse(row.dims), row.role, None, tied)
