"""A model's architecture: a family's table bound to one config. No torch, no disk.

`Arch.from_config` answers every question about shapes before a weight is read: which tensors there
are, what each dimension means, what a cut leaves, and how the config must say it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, Final

from prune_export.arch.conditions import holds, value
from prune_export.arch.dims import Dims
from prune_export.arch.rules import (
    check_lists,
    cut_config,
    refuse_unknown,
    with_names_of,
    with_stored_names,
    write_depth,
    write_width,
)
from prune_export.arch.table import Table, table_for
from prune_export.arch.tensors import Binding, Tensor, members
from prune_export.arch.wrappers import Within
from prune_export.errors import PlanError, UnsupportedArch, did_you_mean

MOST_LAYERS: Final = 10_000
"""Work and memory grow by layer before any weight is seen; models of 2026 have up to 200."""

__all__ = ["Arch", "Dims", "Tensor"]


@dataclass(frozen=True)
class Arch:
    """A family's table bound to one config.

    `sizes` has an entry an axis (`residual`), for axes that may differ by layer an entry a layer
    (`mlp.3`), by expert an entry an expert (`moe.3.7`), and none for an axis that no tensor has.
    `tensors` are in the order of the model. `config` is the full one that it was made from, with
    per-layer entries following the layers. `untied` are keys of it that were turned off so that a
    tensor is stored on its own. `within` says what a larger model (of images and text) asks of the
    language model that it holds, None for a plain one.
    """

    family: str
    sizes: Mapping[str, int]
    layers: int
    tensors: tuple[Tensor, ...]
    config: Mapping[str, Any]
    table: Table
    untied: frozenset[str] = frozenset()
    within: Within | None = None

    @staticmethod
    def from_config(
        config: Mapping[str, Any],
        *,
        ignore_keys: Collection[str] = (),
        table: Table | None = None,
    ) -> Arch:
        """Binds the table of `config["model_type"]`, or another that is given.

        `config` is a full transformers config as a dict (defaults filled in), `ignore_keys` are
        keys that the caller answers for.

        Raises:
            UnsupportedArch: no table, a key or a value that the table does not know.
        """
        table = table or table_for(str(config.get("model_type")), config)
        config = with_stored_names(table, config)
        refuse_unknown(table, config, ignore_keys)
        layers = value(table.layers, config)
        if not 1 <= layers <= MOST_LAYERS:
            raise UnsupportedArch(
                f"config.json  {table.layers}",
                f"got {layers}, expected 1 or more, and at most {MOST_LAYERS:,}",
            )
        check_lists(table, config, layers)
        return _bound(Binding(table, config, layers, {}))

    @cached_property
    def by_name(self) -> Mapping[str, Tensor]:
        """The tensors by stored name."""
        return MappingProxyType({tensor.name: tensor for tensor in self.tensors})

    @property
    def final_norm(self) -> str | None:
        """The module path of the norm after the last block; None where there is none."""
        return self.table.final_norm if holds(self.table.final_norm_when, self.config) else None

    @property
    def positions(self) -> int | None:
        """The number of learned positions, which is a hard limit; None where they are computed."""
        return self.sizes.get("positions")

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block are parallel: both added to the block's input."""
        said = self.table.parallel
        return holds(said, self.config) if isinstance(said, str) else said

    def mlp_in_tuple(self, layer: int) -> bool:
        """Whether the MLP module of a block returns its output as the first of two."""
        said = self.table.tuple_mlp
        if isinstance(said, bool):
            return said
        return layer in members(self.table, said, self.config, self.layers)

    @property
    def further(self) -> tuple[str, ...]:
        """The prefixes of stored names of modules that predict further tokens; none are loaded."""
        said = self.table.further
        count = min(value(f"{said.key} | 0", self.config), MOST_LAYERS) if said else 0
        numbers = [str(self.layers + at) for at in range(count)]
        return tuple(
            prefix.replace("{next}", number)
            for prefix in (said.prefixes if said else ())
            for number in (numbers if "{next}" in prefix else ("",))
        )

    def stored(self) -> tuple[Tensor, ...]:
        """The tensors that a checkpoint holds: all but those tied to another."""
        return tuple(tensor for tensor in self.tensors if tensor.tied_to is None)

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape."""
        return tensor.dims.shape(self.sizes)

    def parameters(self) -> int:
        """The number of stored parameters; tied tensors count once, buffers not at all."""
        return self._parameters

    @cached_property
    def _parameters(self) -> int:
        return sum(prod(self.shape(tensor)) for tensor in self.stored() if not tensor.is_buffer)

    def block_parameters(self) -> int:
        """The number of parameters of all blocks, without embeddings and head."""
        return sum(
            prod(self.shape(tensor))
            for tensor in self.stored()
            if tensor.layer is not None and not tensor.is_buffer
        )

    def head_parameters(self) -> int:
        """The number of weights of the LM head, stored or tied."""
        return sum(prod(self.shape(tensor)) for tensor in self.tensors if tensor.role == "head")

    def block(self, layer: int) -> tuple[Tensor, ...]:
        """The tensors of one block."""
        return tuple(tensor for tensor in self.tensors if tensor.layer == layer)

    def using(self, axis: str) -> tuple[Tensor, ...]:
        """Every tensor that a cut along `axis` (such as `kv.3` or `residual`) must touch.

        For the axis of the experts (`expert.3`) these are the router and every expert's own
        tensors, of which whole ones go.
        """
        name, _, layer = axis.partition(".")
        return tuple(
            tensor
            for tensor in self.tensors
            if axis in tensor.dims.axes()
            or (name == "expert" and tensor.expert is not None and str(tensor.layer) == layer)
        )

    def resized(self, axis: str, size: int) -> Arch:
        """The same model with one axis of another size.

        Raises:
            PlanError: there is no such axis, or it would be empty.
        """
        return self.with_sizes({axis: size})

    def with_sizes(self, sizes: Mapping[str, int]) -> Arch:
        """The same model with several axes of other sizes.

        Raises:
            PlanError: there is no such axis, or one would be empty.
        """
        if self.within:
            self.within.refuse_sizes({a: n for a, n in sizes.items() if n != self.sizes.get(a)})
        for axis, size in sizes.items():
            if axis not in self.sizes:
                raise PlanError(
                    f"axis {axis}", "is not an axis of this model", did_you_mean(axis, self.sizes)
                )
            if size < 1:
                raise PlanError(f"axis {axis}", f"got size {size}, expected at least 1")
        if any(axis.partition(".")[0] == "expert" for axis in sizes):
            return self._bound(self.config, self.layers, {**self.sizes, **sizes})
        # The same tensors of other shapes: only experts come and go with a size.
        return replace(self, sizes=MappingProxyType({**self.sizes, **sizes}))

    def with_own(self, tensor: str) -> Arch:
        """The same model with a tied tensor (such as the head) stored on its own.

        Raises:
            PlanError: the tensor is not tied, or the family's config cannot say that it is not.
        """
        key = next((row.tied_when for row in self.table.rows() if row.name == tensor), None)
        if tensor not in self.by_name or self.by_name[tensor].tied_to is None:
            raise PlanError(tensor, "is stored on its own already", "leave it as it is")
        if not key or not key.isidentifier():
            raise PlanError(tensor, f"is tied in every {self.family} model", "leave it tied")
        untied = replace(self, untied=self.untied | {key})
        return untied._bound({**self.config, key: False}, self.layers, self.sizes)

    def become(self, model_type: str) -> Arch:
        """The same model as another type, which has all of its tensors and may have more.

        Raises:
            UnsupportedArch: there is no table of that type.
            PlanError: it lacks some of the tensors.
        """
        if self.within:
            self.within.refuse_type(model_type)
        table = table_for(model_type)
        names = {"model_type": model_type, "architectures": list(table.architectures)}
        other = replace(self, table=table, family=table.family)
        found = other._bound({**self.config, **names}, self.layers, self.sizes)
        lost = sorted(self.by_name.keys() - found.by_name.keys())
        if lost:
            raise PlanError(lost[0], f"is not a tensor of {model_type}", "keep the model's type")
        return found

    def without(self, layers: Collection[int]) -> Arch:
        """The same model without some blocks; those left are renumbered from 0.

        Raises:
            PlanError: a layer does not exist, none would be left, or the family computes with the
                layer's number.
        """
        kept = self.kept(layers)
        if len(kept) == self.layers:
            return self
        config = cut_config(self.table, self.config, kept)
        renumber = {str(old): str(new) for new, old in enumerate(kept)}
        sizes: dict[str, int] = {}
        for axis, size in self.sizes.items():
            name, *numbers = axis.split(".")
            if not numbers:
                sizes[axis] = size
            elif numbers[0] in renumber:
                sizes[".".join((name, renumber[numbers[0]], *numbers[1:]))] = size
        return self._bound(config, len(kept), sizes)

    @property
    def droppable(self) -> range:
        """The blocks of which any may go: without those that a larger model, or the family, keeps.

        Where the last block must be of a kind, it stays.
        """
        rules = self.table.config
        last = any(self.config.get(key) for key in rules.ends_with)
        return range(self.within.fed if self.within else 0, self.layers - last)

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
        if self.within:
            self.within.refuse_layers(set(layers))
        kept = tuple(layer for layer in range(self.layers) if layer not in set(layers))
        if not kept:
            raise PlanError(
                "layers", f"all {self.layers} blocks would be dropped", "keep at least one"
            )
        return kept

    def origin(self, kept: Sequence[int]) -> Mapping[str, str]:
        """For each stored name of this model cut to `kept`, the name that it has here."""
        new = {layer: number for number, layer in enumerate(kept)}
        found = {}
        for tensor in self.stored():
            if tensor.layer is None:
                found[tensor.name] = tensor.name
            elif tensor.layer in new:
                rest = tensor.name.removeprefix(f"{self.table.on_disk}.{tensor.layer}.")
                found[f"{self.table.on_disk}.{new[tensor.layer]}.{rest}"] = tensor.name
        return found

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with every key rewritten that this model's sizes and layers change.

        `base` may be the full config or a file's, which leaves defaults out. What is unchanged
        stays as it is; what a cut changes is stated, also where `base` left it to a default.

        Raises:
            PlanError: the sizes differ between layers, or the family's config cannot say them.
        """
        written = with_stored_names(self.table, base) | dict.fromkeys(self.untied, False)
        for key in ("model_type", "architectures"):
            if base.get("model_type") not in self.table.model_types:
                written[key] = self.config[key]
        write_depth(self.table, self.config, written)
        if write_width(self.table, self.config, self.sizes, written):
            self._check_written(written)
        return with_names_of(self.table, written, base)

    def _bound(self, config: Mapping[str, Any], layers: int, sizes: Mapping[str, int]) -> Arch:
        bound = _bound(Binding(self.table, config, layers, sizes))
        return replace(bound, untied=self.untied, within=self.within)

    def _check_written(self, written: Mapping[str, Any]) -> None:
        said = _bound(Binding(self.table, {**self.config, **written}, self.layers, {}))
        shapes = {tensor.name: said.shape(tensor) for tensor in said.stored()}
        for tensor in self.stored():
            if shapes.pop(tensor.name, None) != self.shape(tensor):
                raise PlanError(
                    tensor.name,
                    f"would be {self.shape(tensor)}, which no {self.family} config can say",
                    "choose other axes or sizes",
                )


def _bound(binding: Binding) -> Arch:
    tensors = tuple(binding.tensors())
    return Arch(
        binding.table.family,
        MappingProxyType(binding.sizes(tensors)),
        binding.layers,
        tensors,
        MappingProxyType(dict(binding.config)),
        binding.table,
    )
