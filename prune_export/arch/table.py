"""A model family's table: its tensors, axes and config keys, as data.

One YAML file in `families/` describes every model type of a family. `docs/architectures.md` shows
how to write one; the contract test proves it against a tiny random model of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from os import environ
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prune_export.arch import outside
from prune_export.arch.common import common, is_among, parse_yaml
from prune_export.arch.conditions import holds, keys_of, value
from prune_export.arch.dims import Dims
from prune_export.arch.rare import ByKind, Derivation, Further
from prune_export.errors import UnsupportedArch, did_you_mean

__all__ = [
    "Axis", "ConfigRules", "LayerSet", "Table", "TensorRow", "common", "holds", "is_among", "value",
]  # fmt: skip


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Axis(_Frozen):
    """A named size: an expression over config keys.

    It is the same everywhere (`residual`), or its own in each layer (`mlp.3`), or its own in each
    expert of each layer (`moe.3.7`). Where the condition `adjusted_when` holds, it is `adjusted`
    instead of `size`, until a width cut says it anew.
    """

    size: str
    adjusted: str | None = None
    adjusted_when: str | None = None
    per_layer: bool = False
    per_expert: bool = False

    def said(self, config: Mapping[str, Any]) -> str:
        """The expression that gives the size under a config."""
        adjusts = self.adjusted and holds(self.adjusted_when, config)
        return self.adjusted if adjusts and self.adjusted else self.size


class TensorRow(_Frozen):
    """One tensor of the table.

    `name` is the stored name; inside `block` it is relative to the block and may hold `{expert}`.
    `when` is a condition over config keys (`attention_bias`, `not bias`, `activation == gelu`).
    `layers` limits a row to a named layer set of the table, or to `not` that set.
    """

    name: str
    role: str
    dims: str
    when: str | None = None
    layers: str | None = None
    tied_to: str | None = None
    tied_when: str | None = None


class LayerSet(_Frozen):
    """Layers chosen by config keys, in one of four ways; after a depth cut it is written back.

    1. Those with (i + 1) divisible by `every`, not listed in `excluding`, from `first` on up to
       `last`. Written as `every: 1` and the rest in `excluding`, or by step, first and last.
    2. Those whose entry in the per-layer list `of` is one of `values`: the list is sliced.
    3. Those in the list `listed`, which is renumbered.
    4. Those with i % `period` == `offset`: the smallest period that says the same is written.

    Where the condition `when` does not hold, the set is empty and its keys say nothing.
    """

    every: str | None = None
    excluding: str | None = None
    first: str | None = None
    last: str | None = None
    of: str | None = None
    values: list[Any] = Field(default_factory=list)
    listed: str | None = None
    period: str | None = None
    offset: str | None = None
    when: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The config keys that say it, and that a depth cut rewrites with it."""
        said = (self.every, self.excluding, self.first, self.last)
        return tuple(filter(None, (*said, self.listed, self.period, self.offset)))


class Count(_Frozen):
    """A key that says how many entries of the per-layer list `of` are `value`."""

    of: str
    value: str


class ConfigRules(_Frozen):
    """What each config key means for a cut; a key that stands nowhere is refused.

    Attributes:
        known: keys that need no change.
        accepts: keys of which this table is true only for the values listed.
        per_layer: lists with one entry a layer; sliced with the layers, and written out after a
            depth cut even where the file left them to a default.
        derives: keys that only fill in a `per_layer` list that is absent. After a depth cut the
            list is written, and these, now untrue, are removed.
        counts: keys that count entries of a `per_layer` list; recounted after a depth cut.
        depth_requires: keys that must have the value given before blocks may be renumbered,
            because a block computes with its own number.
        by_root_of_depth: numbers that a block divides by the square root of the number of layers;
            a depth cut scales them, so that blocks compute what they did.
        writes: for each key that states a size, its value as an expression over the axes.
        sets: keys that a width cut sets to a value, so that `writes` are taken as they are.
        divides: key pairs (divisor, multiple) that transformers insists on.
        at_most: key pairs (less, more) without which the model cannot run.
        grouped: for an axis, the key that says into how many groups its places are divided, each
            with a part of its own in the computation; with more than one it cannot be cut.
        aliases: other names that transformers accepts for a key, and the name that it writes.
        by_kind: sizes of a kind of layers that transformers writes layer by layer.
        ends_with: what the last entry of a `per_layer` list must be.
    """

    known: list[str] = Field(default_factory=list)
    accepts: dict[str, list[Any]] = Field(default_factory=dict)
    per_layer: list[str] = Field(default_factory=list)
    derives: list[str] = Field(default_factory=list)
    counts: dict[str, Count] = Field(default_factory=dict)
    depth_requires: dict[str, Any] = Field(default_factory=dict)
    by_root_of_depth: list[str] = Field(default_factory=list)
    writes: dict[str, str] = Field(default_factory=dict)
    sets: dict[str, Any] = Field(default_factory=dict)
    divides: list[tuple[str, str]] = Field(default_factory=list)
    at_most: list[tuple[str, str]] = Field(default_factory=list)
    grouped: dict[str, str] = Field(default_factory=dict)
    aliases: dict[str, str] = Field(default_factory=dict)
    by_kind: ByKind | None = None
    ends_with: dict[str, Any] = Field(default_factory=dict)


class Bundled(_Frozen):
    """Code of ours that a checkpoint brings along: `file.Class` in `prune_export.modeling`.

    Where `prune_export.modeling.register()` was called it is not needed, else
    `trust_remote_code=True` is.
    """

    configuration: str
    modeling: str

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files."""
        return tuple(f"{said.partition('.')[0]}.py" for said in (self.configuration, self.modeling))

    def auto_map(self) -> dict[str, str]:
        """What config.json says of it."""
        return {"AutoConfig": self.configuration, "AutoModelForCausalLM": self.modeling}


class Tiny(_Frozen):
    """The tiny random models that prove a table.

    `config` is given to transformers' config class; each of `variants` is a set of changes to it.
    """

    config: dict[str, Any]
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Table(_Frozen):
    """The table of a family.

    `blocks`, `final_norm` and `embeddings` are module paths in the transformers model, which are
    also prefixes of the stored names: the list of blocks, the norm after the last block (None, or
    `final_norm_when` untrue, where there is none), and what runs before the first block. Where
    blocks have another prefix on disk, it is `stored_blocks`.

    `layers` is the key that counts the blocks; where files need not have it, as the length of a
    list says it, `layers_of` is that list.

    `norm` is what the norms on the residual states do before their gain: `rms` divides by the root
    mean square, which a rotation leaves alone; `layer` subtracts the mean first.

    `parallel` says, or on which condition, that a block adds its attention and its MLP to the same
    states, those that enter it; else its MLP reads what the attention was added to.

    `tuple_blocks` says that the model takes the first of what a block returns, not all of it.

    `tuple_mlp` says that an MLP returns its output as the first of two; or in which layer set.

    `untraceable` says what of it no exporter's graph can hold, as an end of a sentence.

    `unadapted` are roles that get no adapter: joined kernels of training read their weights alone.

    `parts_add` says that the modules of attention and MLP add the residual states themselves.

    `per_sample` names arguments of a block whose first dimension is samples times heads (ALiBi's
    bias), so that they do not broadcast from one sample to many.

    `bundled` is the code that a checkpoint of a model type of ours brings along.

    `derived` marks a table that was made by `prune_export.deriving`, not by a person.

    `ignored_tensors` are ends of names (`rotary_emb.inv_freq`) of buffers that old releases of
    transformers stored and that carry nothing: they are accepted, and left behind.

    `further` says where modules that predict further tokens lie: they are left behind.

    `scaled_embeddings` says that embeddings are multiplied by the square root of the axis
    `residual`; `norm_offset` is what norms add to their stored gain.

    What the projections back give is added to the residual states, times the config key
    `added_times` where there is one. It is not where it is normalized first (a row with role
    `norm.attn.out` or `norm.mlp.out`), or where `added_when` is untrue.
    """

    family: str
    model_types: list[str]
    architectures: list[str]
    source: str
    bundled: Bundled | None = None
    derived: Derivation | None = None
    layers: str
    layers_of: str | None = None
    blocks: str
    stored_blocks: str | None = None
    final_norm: str | None
    final_norm_when: str | None = None
    norm: Literal["rms", "layer"]
    parallel: bool | str = False
    tuple_blocks: bool = False
    untraceable: str = ""
    unadapted: list[str] = Field(default_factory=list)
    tuple_mlp: bool | str = False
    parts_add: bool = False
    per_sample: list[str] = Field(default_factory=list)
    embeddings: list[str]
    axes: dict[str, Axis]
    layer_sets: dict[str, LayerSet] = Field(default_factory=dict)
    head: list[TensorRow]
    block: list[TensorRow]
    tail: list[TensorRow]
    ignored_tensors: list[str] = Field(default_factory=list)
    further: Further | None = None
    scaled_embeddings: bool = False
    norm_offset: float = 0.0
    added_when: str | None = None
    added_times: str | None = None
    config: ConfigRules
    tiny: Tiny
    notes: str = ""

    @property
    def on_disk(self) -> str:
        """The prefix of the stored names of all blocks."""
        return self.stored_blocks or self.blocks

    def rows(self) -> Iterator[TensorRow]:
        """Every row, in the order of the model."""
        yield from (*self.head, *self.block, *self.tail)

    def depth_keys(self) -> tuple[str, ...]:
        """The config keys that a depth cut rewrites."""
        sets = [key for row in self.layer_sets.values() for key in row.keys]
        rules = self.config
        return (self.layers, *rules.per_layer, *sets, *rules.counts, *rules.by_root_of_depth)

    def further_keys(self) -> frozenset[str]:
        """The config key that counts modules predicting further tokens, with its aliases."""
        key = self.further.key if self.further else None
        same = {alias for alias, of in self.config.aliases.items() if of == key}
        return frozenset(filter(None, {key, *same}))

    def keys(self) -> frozenset[str]:
        """Every config key that the table knows, without those common to all families."""
        rules = self.config
        sized = {
            key
            for axis in self.axes.values()
            for said in (axis.size, axis.adjusted or "", axis.adjusted_when or "")
            for key in keys_of(said)
        }
        return frozenset(
            {*rules.known, *rules.accepts, *rules.derives, *rules.depth_requires, *rules.writes}
            | rules.sets.keys()
            | {*rules.aliases, *rules.grouped.values(), *self.depth_keys()}
            | sized
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        known, names = self.keys() | common().keys(), {row.name for row in self.rows()}
        for row in self.rows():
            unknown = Dims.parse(row.dims).axes() - self.axes.keys()
            if unknown:
                raise ValueError(f"{row.name}: dims use unknown axes {sorted(unknown)}")
            if row.layers and row.layers.removeprefix("not ") not in self.layer_sets:
                raise ValueError(f"{row.name}: unknown layer set {row.layers!r}")
            if row.tied_to and row.tied_to not in names:
                raise ValueError(f"{row.name}: tied to {row.tied_to}, which is no row")
            for condition in (row.when, row.tied_when):
                unknown = keys_of(condition or "") - known
                if unknown:
                    raise ValueError(f"{row.name}: condition on unknown keys {sorted(unknown)}")
        unknown = (keys_of(self.added_when or "") | {self.added_times or ""}) - known - {""}
        if unknown:
            raise ValueError(f"added_when, added_times: unknown keys {sorted(unknown)}")
        for name, chosen in self.layer_sets.items():
            unknown = keys_of(chosen.when or "") - known
            if unknown or (chosen.of and chosen.of not in self.config.per_layer):
                raise ValueError(f"layer_sets.{name}: unknown keys {sorted(unknown) or chosen.of}")
        unknown = frozenset(self.config.grouped.keys() - self.axes.keys())
        if unknown:
            raise ValueError(f"config.grouped: unknown axes {sorted(unknown)}")
        for key, expression in self.config.writes.items():
            unknown = keys_of(expression) - self.axes.keys()
            if unknown:
                raise ValueError(f"config.writes.{key}: unknown axes {sorted(unknown)}")
        return self


def tables() -> Mapping[str, Table]:
    """Every table, by model type: ours, then those from outside (`prune_export.arch.outside`).

    Of tables that were derived, each for one config, the first of a type is given here;
    `table_for` chooses among them.

    Raises:
        UnsupportedArch: a table is malformed; file and key are named. Two describe one model type.
    """
    return _tables(environ.get(outside.VARIABLE, ""))[0]


@cache
def _own_tables() -> Mapping[str, Table]:
    found: dict[str, Table] = {}
    for entry in sorted(files("prune_export.arch").joinpath("families").iterdir(), key=str):
        if entry.name.endswith(".yaml") and not entry.name.startswith("_"):
            table = parse_table(entry.read_text(encoding="utf-8"), f"families/{entry.name}")
            found |= dict.fromkeys(table.model_types, table)
    return found


@cache
def _tables(listed: str) -> tuple[Mapping[str, Table], Mapping[str, tuple[Table, ...]]]:
    return outside.joined(_own_tables(), listed, parse_table)


def parse_table(text: str, where: str) -> Table:
    """Parses a YAML table; `where` is its file, for messages.

    Raises:
        UnsupportedArch: it is malformed.
    """
    try:
        return Table.model_validate(parse_yaml(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise UnsupportedArch(
            f"{where}  {key}".rstrip(),
            first["msg"],
            "docs/architectures.md shows what a table may say",
        ) from None
    except yaml.YAMLError as error:
        raise UnsupportedArch(where, f"is not YAML: {error}") from None


def table_for(model_type: str, config: Mapping[str, Any] | None = None) -> Table:
    """Finds the table of a model type; of several that were derived, the first true of `config`.

    Raises:
        UnsupportedArch: no table describes it.
    """
    known, derived = _tables(environ.get(outside.VARIABLE, ""))
    if model_type not in known:
        raise UnsupportedArch(
            "config.json  model_type",
            f"got {model_type!r}, which no architecture table describes",
            f"{did_you_mean(model_type, known)}; `prune-export families derive MODEL` tries to "
            "make and prove a table; one by hand is one YAML file (docs/architectures.md)",
        )
    for table in derived.get(model_type, ()):
        limited = table.config.accepts.items()
        said = config or {}
        if all(is_among(said[key], values) for key, values in limited if key in said):
            return table
    return known[model_type]
