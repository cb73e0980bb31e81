"""Applies a table's rules for config keys: refuses, slices and writes them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from prune_export.arch.conditions import holds, keys_of, value
from prune_export.arch.rare import PER_LAYER
from prune_export.arch.table import LayerSet, Table, common, is_among
from prune_export.arch.tensors import members
from prune_export.errors import PlanError, UnsupportedArch, did_you_mean


def with_stored_names(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces aliases of config keys by the names that transformers writes."""
    named = dict(config)
    for alias, key in table.config.aliases.items():
        if alias in named:
            other = named.pop(alias)
            if named.setdefault(key, other) != other:
                raise UnsupportedArch(
                    f"config.json  {alias}",
                    f"got {other!r}, but {key}, which means the same, is {named[key]!r}",
                    "remove the one that is wrong",
                )
    listed = named.get(table.layers_of or "")
    if isinstance(listed, list | tuple):
        named[table.layers] = len(listed)
    return _without_layers(table, named)


def _without_layers(table: Table, named: dict[str, Any]) -> dict[str, Any]:
    """Reads what `per_layer_config` says of a kind of layers as keys of that kind.

    Raises:
        UnsupportedArch: it says something of other layers, of one alone, or another key.
    """
    rule, each = table.config.by_kind, named.get(PER_LAYER)
    if rule is None or not isinstance(each, Mapping):
        return named
    inside = members(table, rule.layers, named, value(table.layers, named))
    entries = {int(layer) if str(layer).isdecimal() else -1: one for layer, one in each.items()}
    one: Any = next(iter(entries.values()), {})
    if (
        entries.keys() != inside
        or any(entry != one for entry in entries.values())
        or not isinstance(one, Mapping)
        or one.keys() - rule.keys.keys()
    ):
        raise UnsupportedArch(
            f"config.json  {PER_LAYER}",
            f"got {each!r:.60}, expected the same {' and '.join(rule.keys)} for each of the layers "
            f"{sorted(inside)}, and for no other",
            "save the model again with the transformers that it came with",
        )
    said = {key: value for key, value in named.items() if key != PER_LAYER}
    return said | {rule.keys[key]: size for key, size in one.items()}


def with_names_of(
    table: Table, config: Mapping[str, Any], base: Mapping[str, Any]
) -> dict[str, Any]:
    """Renames config keys back to the names that `base` had for them, for its other readers."""
    used = {
        key: alias
        for alias, key in table.config.aliases.items()
        if alias in base and key not in base
    }
    named = {used.get(key, key): value for key, value in config.items()}
    if table.layers_of and table.layers not in base:
        named.pop(table.layers, None)
    rule = table.config.by_kind
    if rule is None or PER_LAYER not in base:
        return named
    inside = members(table, rule.layers, config, value(table.layers, config))
    each = {old: named.pop(new) for old, new in rule.keys.items() if new in named}
    digits = len(str(value(table.layers, config) - 1))
    return {**named, PER_LAYER: {f"{layer:0{digits}}": each for layer in sorted(inside)}}


def refuse_unknown(table: Table, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Checks every key of a config against the table.

    Raises:
        UnsupportedArch: a key or a value that the table does not know, unless it is in `ignore`.
    """
    shared, known = common(), table.keys() | common().keys()
    for key in sorted(config.keys() - set(ignore)):
        got = config[key]
        if key not in known:
            raise UnsupportedArch(
                f"config.json  {key}",
                f"the {table.family} table does not know this key (value {got!r:.60})",
                f"if it does not change the computation, pass `--ignore-config-key {key}`",
            )
        if key in shared.refuses and got:
            raise UnsupportedArch(
                f"config.json  {key}", f"got {got!r:.60}, expected none", shared.refuses[key]
            )
        accepted = table.config.accepts.get(key, shared.accepts.get(key))
        if accepted is not None and not is_among(got, accepted):
            close = did_you_mean(got, filter(None, accepted)) if isinstance(got, str) else ""
            raise UnsupportedArch(
                f"config.json  {key}",
                f"got {got!r:.60}, the {table.family} table is true for {_listed(accepted)}",
                close,
            )


def check_lists(table: Table, config: Mapping[str, Any], layers: int) -> None:
    """Checks that every per-layer list has an entry for each layer.

    Raises:
        UnsupportedArch: one has not, or is no list.
    """
    for key in table.config.per_layer:
        listed = config.get(key)
        if listed is None:
            continue
        if not isinstance(listed, list | tuple) or len(listed) != layers:
            count = f"{len(listed)} entries" if isinstance(listed, list | tuple) else f"{listed!r}"
            raise UnsupportedArch(
                f"config.json  {key}",
                f"got {count}, expected a list with one entry for each of {layers} layers",
            )


def cut_config(table: Table, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config of the model that has only the layers `kept`, renumbered from 0.

    Raises:
        PlanError: a block computes with its own number, which would change.
    """
    layers, rules = value(table.layers, config), table.config
    for key, wanted in rules.depth_requires.items():
        if config.get(key, wanted) != wanted and list(kept) != list(range(len(kept))):
            raise PlanError(
                f"config.json  {key}",
                f"is {config[key]!r}: each block computes with its own number, so no block but "
                "the last ones can be dropped without changing others",
                "drop blocks from the end (method `deepest`), or choose a width method",
            )
    cut = dict(config) | {table.layers: len(kept)}
    for key in rules.per_layer:
        if config.get(key) is not None:
            cut[key] = [config[key][layer] for layer in kept]
    for key, wanted in rules.ends_with.items():
        if cut.get(key) and cut[key][-1] != wanted:
            raise PlanError(
                f"config.json  {key}",
                f"would end with {cut[key][-1]!r}; transformers insists that the last block is "
                f"{wanted!r}",
                f"keep block {layers - 1}, or one of that kind as the last one",
            )
    for key in rules.by_root_of_depth:
        if isinstance(config.get(key), int | float):
            cut[key] = config[key] * (len(kept) / layers) ** 0.5
    for name, row in table.layer_sets.items():
        if not holds(row.when, config):
            continue
        inside = members(table, name, config, layers)
        new = [number for number, old in enumerate(kept) if old in inside]
        cut |= _set_keys(row, new, len(kept))
    for key, count in rules.counts.items():
        if cut.get(count.of) is not None and key in config:
            cut[key] = cut[count.of].count(count.value)
    return cut


def _set_keys(row: LayerSet, inside: Sequence[int], layers: int) -> dict[str, Any]:
    """The config keys of a layer set that is to hold the layers `inside`, of so many.

    Raises:
        PlanError: its keys cannot say them.
    """
    if row.of:
        return {}  # its list was sliced
    if row.listed:
        return {row.listed: list(inside)}
    if row.period and row.offset:
        for period in range(1, layers + 2):
            for offset in range(period):
                if [i for i in range(layers) if i % period == offset] == list(inside):
                    return {row.period: period, row.offset: offset}
        raise _unsayable(row, inside, layers, "a period and an offset")
    if row.excluding:
        said: dict[str | None, Any] = {
            row.every: 1,
            row.excluding: [layer for layer in range(layers) if layer not in set(inside)],
        }
        return {key: value for key, value in said.items() if key}
    if not inside:
        said = {row.every: 1, row.first: layers, row.last: layers}
        return {key: value for key, value in said.items() if key}
    # Told from the first layer on up to the last one; where a key is missing, from end to end.
    first = inside[0] if row.first else 0
    last = inside[-1] if row.last else layers - 1
    for every in range(1, layers + 1 if row.every else 2):
        if [i for i in range(first, last + 1) if (i + 1) % every == 0] == list(inside):
            said = {row.every: every, row.first: first, row.last: last}
            return {key: value for key, value in said.items() if key}
    raise _unsayable(row, inside, layers, "a first block, a last one and a step")


def _unsayable(row: LayerSet, inside: Sequence[int], layers: int, told: str) -> PlanError:
    return PlanError(
        f"config.json  {', '.join(row.keys)}",
        f"cannot say which of the {layers} blocks left are of which kind: {list(inside)} are of "
        f"one kind, and the keys tell {told}",
        "drop other blocks: whole runs of one kind, or as many of each kind in turn",
    )


def write_depth(table: Table, cut: Mapping[str, Any], written: dict[str, Any]) -> None:
    """Writes the depth keys of `cut` into `written`, in place.

    A file that leaves a per-layer list to a default says something else once the layers are cut,
    so after a cut every list is stated.
    """
    unchanged = written.get(table.layers) == cut[table.layers]
    for key in table.depth_keys():
        if key in cut and not (unchanged and written.get(key) is None):
            written[key] = cut[key]
    if not unchanged:
        for key in table.config.derives:
            written.pop(key, None)


def write_width(
    table: Table, config: Mapping[str, Any], sizes: Mapping[str, int], written: dict[str, Any]
) -> bool:
    """Writes the sizes into `written`, in place, and returns whether any had changed.

    Raises:
        PlanError: they differ between layers or experts, or the family's config cannot say them.
    """
    uniform: dict[str, int] = {}
    for axis, size in sizes.items():
        name = axis.split(".")[0]
        if uniform.setdefault(name, size) != size:
            found = sorted({size for key, size in sizes.items() if key.split(".")[0] == name})
            raise PlanError(
                f"axis {name}",
                f"has sizes {found} in different places, which a stock config cannot say",
                "choose one size for all",
            )
    changed = _unsaid(table, config, uniform)
    if not changed:
        return False
    for name, key in table.config.grouped.items():
        if name in changed and value(f"{key} | 1", config) > 1:
            raise PlanError(
                f"axis {name}",
                f"is divided into {config[key]} groups by `{key}`, of which some are chosen for "
                "each token: without some of their members, others would be chosen",
                "cut another part",
            )
    everywhere = {
        name: uniform[name] if name in uniform else value(axis.said(config), config)
        for name, axis in table.axes.items()
    }
    for key, expression in table.config.writes.items():
        written[key] = _written(key, expression, everywhere)
    written.update(table.config.sets)
    said = {**config, **written}
    for name in _unsaid(table, said, uniform):
        raise PlanError(
            f"axis {name}",
            f"cannot have size {uniform[name]}: a {table.family} config says "
            f"`{table.axes[name].said(said)}`, which would be "
            f"{_says(table, name, said) or 'no whole number'}",
            "choose another axis or size",
        )
    for divisor, multiple in table.config.divides:
        if said[multiple] % said[divisor]:
            raise PlanError(
                f"config.json  {divisor}",
                f"would be {said[divisor]}, but transformers insists that it divides {multiple}, "
                f"{said[multiple]}",
                f"choose a {divisor} that divides it",
            )
    for less, more in table.config.at_most:
        if said[less] > said[more]:
            raise PlanError(
                f"config.json  {more}",
                f"would be {said[more]}, fewer than {less}, {said[less]}",
                f"keep at least {said[less]}",
            )
    return True


def _written(key: str, expression: str, sizes: Mapping[str, int]) -> int:
    try:
        return value(expression, sizes)
    except UnsupportedArch:
        raise PlanError(
            f"config.json  {key}",
            f"is `{expression}`, which would be no whole number: "
            f"{' and '.join(f'{axis} {sizes[axis]}' for axis in sorted(keys_of(expression)))}",
            "choose sizes that divide each other",
        ) from None


def _unsaid(table: Table, config: Mapping[str, Any], uniform: Mapping[str, int]) -> list[str]:
    return [name for name, size in uniform.items() if _says(table, name, config) != size]


def _says(table: Table, axis: str, config: Mapping[str, Any]) -> int | None:
    try:
        return value(table.axes[axis].said(config), config)
    except UnsupportedArch:
        return None


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(repr(value) for value in values)
