"""Shrinks a config so that a random model of it is tiny, and every size in it is another number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from prune_export.arch.table import common
from prune_export.deriving.instances import NO_ENDS, build, config_class, logits, prompt, quietly
from prune_export.errors import UnsupportedArch

Shapes = dict[str, tuple[int, ...]]

_STANDARD: Final[Mapping[str, tuple[str, ...]]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "residual": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"),
    "vocab": ("vocab_size",),
    "kv": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "dim": ("head_dim", "kv_channels", "dim_head", "d_kv"),
}
"""What config keys of transformers are called; a class's `attribute_map` is asked first."""

_NEEDED: Final = ("layers", "residual", "heads", "vocab")
_LEAST_LAYERS: Final = 6
_MOST_LAYERS: Final = 48
"""A random model with more blocks than these would be no small one."""
_WINDOW: Final = 4
_POSITIONS: Final = 61
_WIDTHS: Final = tuple(4 * prime for prime in (17, 19, 23, 29, 31, 37, 41, 43, 47, 53))
"""Widths are primes, times what kernels of mixtures ask for."""
_VOCABULARY: Final = 97
_EXPERTS: Final = 5
_CHOSEN: Final = 2
_WIDE_HEAD: Final = 128
_LARGEST_TRIED: Final = 1 << 20


@dataclass(frozen=True)
class Keys:
    """The config keys of sizes: the standard ones by axis, and others that move shapes."""

    standard: Mapping[str, str]
    others: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    """Lists with an entry a layer."""

    def __getitem__(self, axis: str) -> str:
        return self.standard[axis]


@dataclass(frozen=True)
class Small:
    """A shrunk config, the keys that were found, and what was changed to shrink it."""

    config: dict[str, Any]
    keys: Keys
    changed: frozenset[str] = field(default_factory=frozenset)
    moved: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """For each key of `keys.others`, the tensors in memory whose shapes follow it."""
    as_wide: tuple[str, ...] = ()
    """Keys that say the hidden size again."""


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Names in memory and shapes of the model of a config; nothing is allocated."""
    return {name: tuple(one.shape) for name, one in build(config, "meta").state_dict().items()}


def of_depth(config: Mapping[str, Any], keys: Keys, layers: int) -> dict[str, Any]:
    """The config of the first blocks alone."""
    cut = dict(config) | {keys["layers"]: layers}
    for key in keys.listed:
        cut[key] = list(config[key])[:layers]
    return cut


def keys_of(config: Mapping[str, Any]) -> Keys:
    """Finds the config keys of a model's sizes, those of no standard name by varying each.

    Raises:
        UnsupportedArch: one that every model has is not there.
    """
    named = getattr(config_class(str(config["model_type"])), "attribute_map", None) or {}
    found = {}
    for axis, names in _STANDARD.items():
        ways = [named[name] for name in names if name in named] + list(names)
        key = next((name for name in ways if type(config.get(name)) is int), None)
        if key is not None:
            found[axis] = key
        elif axis in _NEEDED:
            raise UnsupportedArch(
                "config.json",
                f"says nowhere how many {axis} there are: {', '.join(names)} are not there",
                "write a table by hand (docs/architectures.md)",
            )
    layers = config[found["layers"]]
    listed = tuple(
        key
        for key, value in config.items()
        if isinstance(value, list | tuple) and len(value) == layers > 1
    )
    keys = Keys(found, listed=listed)
    return Keys(found, tuple(_others(config, keys)), listed)


def _others(config: Mapping[str, Any], keys: Keys) -> Iterator[str]:
    """Keys of whole numbers, or of nothing, with which shapes move and names stay."""
    base = of_depth(config, keys, min(_LEAST_LAYERS, config[keys["layers"]]))
    before = shapes(base)
    known = {*keys.standard.values(), *common().keys()}
    for key, value in config.items():
        plain = value is None or (type(value) is int and 0 < value < _LARGEST_TRIED)
        if key in known or not plain or key.endswith("_token_id"):
            continue
        for other in (37,) if value is None else (2 * value, value + 1, value // 2):
            try:
                after = shapes(base | {key: other})
            except Exception:  # a class refuses odd values in its own way
                continue
            if after != before:
                if after.keys() == before.keys():
                    yield key
                break


def shrunk(config: Mapping[str, Any]) -> Small:
    """Finds small sizes with which the model of a config is built and runs.

    Raises:
        UnsupportedArch: none of those tried does.
    """
    keys = keys_of(config)
    reasons: list[str] = []
    base, moved = _base(config, keys)
    for sizes in _tried(config, keys):
        small = {**base, **sizes, **NO_ENDS}
        for key in _as_wide(config, keys):
            small[key] = sizes[keys["residual"]]
        try:
            with quietly():
                made = config_class(str(config["model_type"])).from_dict(small).to_dict()
            values = logits(build(made), prompt(_VOCABULARY))
        except Exception as error:  # the model's own code, on what it was not made for
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        if bool(torch.isfinite(values).all()):
            changed = {key for key in config if made.get(key) != config[key]}
            return Small(made, keys, frozenset(changed), moved, tuple(_as_wide(config, keys)))
        reasons.append("its logits are not finite")
    raise UnsupportedArch(
        "config.json",
        f"no small model of the type {config['model_type']} could be made: {reasons[-1]}",
        "write a table by hand (docs/architectures.md)",
    )


def _as_wide(config: Mapping[str, Any], keys: Keys) -> list[str]:
    """Other keys that say the hidden size again, with which a model would be another one."""
    known = {*keys.standard.values(), *keys.others, *common().keys()}
    wide = config[keys["residual"]]
    return [key for key, value in config.items() if key not in known and value == wide]


def _base(
    config: Mapping[str, Any], keys: Keys
) -> tuple[dict[str, Any], dict[str, frozenset[str]]]:
    """The config of fewest blocks in which there is one of each kind, with small odd sizes.

    With it what follows each key.
    """
    moved: dict[str, frozenset[str]] = {}
    small = of_depth(config, keys, _depth(config, keys))
    whole, before = dict(small), shapes(small)
    widths = iter(_WIDTHS)
    for key in keys.others:
        value = small[key]
        rows = _moves(whole, before, key)
        moved[key] = frozenset(rows)
        if value is None:
            continue
        if any("position" in name for name in rows):
            small[key] = min(value, _POSITIONS)
        elif all(before[name][0] == value for name in rows) and "expert" in key:
            small[key] = min(value, _EXPERTS)
        elif value > _WIDTHS[-1]:
            small[key] = next(widths)
    for key, value in small.items():
        if type(value) is not int or key in keys.others:
            continue
        if "window" in key and value > _WINDOW and "layer" not in key:
            small[key] = _WINDOW
        elif ("per_tok" in key or "top_k" in key or "topk" in key) and value > _CHOSEN:
            small[key] = _CHOSEN
    return small, moved


def _moves(config: Mapping[str, Any], before: Shapes, key: str) -> list[str]:
    value = config[key]
    for other in (37,) if value is None else (2 * value, value + 1, value // 2):
        try:
            after = shapes({**config, key: other})
        except Exception:  # as above
            continue
        if moved := [name for name in before if after.get(name) != before[name]]:
            return moved
    return []


def _depth(config: Mapping[str, Any], keys: Keys) -> int:
    """The fewest blocks, from the first on, among which is one of each kind."""
    layers = int(config[keys["layers"]])
    lists = [[repr(one) for one in config[key]] for key in keys.listed]
    kinds = list(zip(*lists, strict=True)) or [()] * layers
    needed = max(kinds.index(kind) for kind in set(kinds)) + 1 if lists else 1
    needed = max(needed, _first_of_tensors(config, keys))
    if needed > _MOST_LAYERS:
        raise UnsupportedArch(
            "config.json",
            f"its first {needed} blocks are needed to see one of each kind, more than "
            f"{_MOST_LAYERS}",
            "write a table by hand (docs/architectures.md)",
        )
    return min(layers, max(_LEAST_LAYERS, needed + (needed < layers)))


def _first_of_tensors(config: Mapping[str, Any], keys: Keys) -> int:
    """How many blocks there are until the last new set of tensors."""
    names: dict[int, set[str]] = {}
    for name, shape in shapes(config).items():
        numbers = [part for part in name.split(".") if part.isdecimal()]
        if numbers:
            own = name.replace(f".{numbers[0]}.", ".*.", 1)
            names.setdefault(int(numbers[0]), set()).add(f"{own} {shape}")
    kinds = [frozenset(names[layer]) for layer in sorted(names)]
    return max((kinds.index(kind) for kind in set(kinds)), default=0) + 1


def _tried(config: Mapping[str, Any], keys: Keys) -> Iterator[dict[str, int]]:
    """Sizes for heads and states: grouped or not, of small heads or of those that it has."""
    own = keys.standard.get("dim")
    heads = int(config[keys["heads"]])
    true = int(config[own]) if own else int(config[keys["residual"]]) // heads
    groups = [(3, 2), (2, 2), (4, 1), (3, 1)] if "kv" in keys.standard else [(3, 1), (4, 1)]
    if "kv" in keys.standard and config[keys["kv"]] == 1:
        groups = [(1, 5), (1, 4)]
    for dim in dict.fromkeys((16, min(true, 64), min(true, _WIDE_HEAD))):
        for kv, group in groups:
            wide = kv * group * dim
            for residual in (60, kv * group * 20, wide) if own else (wide,):
                sizes = {
                    keys["vocab"]: _VOCABULARY,
                    keys["heads"]: kv * group,
                    keys["residual"]: residual,
                }
                if "kv" in keys.standard:
                    sizes[keys["kv"]] = kv
                if own:
                    sizes[own] = dim
                yield sizes
