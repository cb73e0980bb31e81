"""The tensors of a model's blocks, by kind: all alike, or dense ones and others with experts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate.streaming.layerwise_model import ModuleNames
from prune_export.deriving import proof
from prune_export.deriving.small import Small, shapes
from prune_export.errors import UnsupportedArch

BY_HAND: Final = (
    "write a table by hand: docs/architectures.md shows how, and what a table near to it says"
)
_EXPERT: Final = re.compile(r"\.experts\.([0-9]+)\.")

Stored = dict[str, tuple[str, tuple[int, ...]]]
"""By a tensor's name on disk, its name in memory and its shape."""


@dataclass(frozen=True)
class Experts:
    """The experts of a block: the module around them, in memory, their number and their width."""

    home: str
    count: int
    width: int


@dataclass(frozen=True)
class Kind:
    """Blocks that hold the same tensors; names of experts have `{expert}` for the number."""

    tensors: Stored
    layers: tuple[int, ...]
    experts: Experts | None = None


def stored_names(path: Path, model: Any) -> Stored:
    """Every tensor of a saved model, in the order of the model in memory."""
    names = ModuleNames(model)
    order = {name: index for index, name in enumerate(model.state_dict())}
    found = {
        name: (names.renamed(name), shape) for name, shape in proof.shapes_on_disk(path).items()
    }
    return dict(sorted(found.items(), key=lambda item: (order.get(item[1][0], 0), item[0])))


def kinds_of(stored: Stored, blocks: str) -> list[Kind]:
    """The kinds of blocks, one or two; of two, the second has what the first lacks: experts.

    Raises:
        UnsupportedArch: there are more, or tensors that derived tables do not know.
    """
    found: dict[int, Stored] = {}
    counts: dict[int, set[int]] = {}
    start = f"{blocks}."
    for name, (inside, shape) in stored.items():
        if not (inside.startswith(start) and name.startswith(start)):
            continue
        number, _, rest = name.removeprefix(start).partition(".")
        layer, own = int(number), inside.removeprefix(f"{start}{number}.")
        expert = _EXPERT.search(rest)
        if expert:
            counts.setdefault(layer, set()).add(int(expert[1]))
            if expert[1] != "0":
                continue
            rest = rest.replace(expert[0], ".experts.{expert}.", 1)
        elif len(shape) > 2:
            raise _unknown(f"{rest} has {len(shape)} dimensions (fused experts, or a convolution)")
        found.setdefault(layer, {})[rest] = (own, shape)
    groups: list[tuple[Stored, list[int]]] = []
    for layer in sorted(found):
        same = next((layers for tensors, layers in groups if tensors == found[layer]), None)
        if same is None:
            groups.append((found[layer], [layer]))
        else:
            same.append(layer)
    kinds = [
        Kind(tensors, tuple(layers), _experts(tensors, len(counts.get(layers[0], ()))))
        for tensors, layers in groups
    ]
    kinds.sort(key=lambda kind: kind.experts is not None)
    if len(kinds) > 2 or (len(kinds) == 2 and (kinds[0].experts or not kinds[1].experts)):
        odd = min(set(kinds[0].tensors.items()) ^ set(kinds[1].tensors.items()))
        raise _unknown(
            f"its blocks differ: {odd[0]} {list(odd[1][1])} is in some of them only, and derived "
            "tables know blocks of one kind, or of two of which one has experts"
        )
    if len(kinds) == 2:
        for name, (_, shape) in kinds[0].tensors.items():
            if kinds[1].tensors.get(name, ("", shape))[1] != shape:
                raise _unknown(f"{name} has other shapes in blocks with experts")
    return kinds


def _unknown(what: str) -> UnsupportedArch:
    return UnsupportedArch("config.json  model_type", what, BY_HAND)


def _experts(tensors: Stored, count: int) -> Experts | None:
    down = [
        (inside, shape)
        for name, (inside, shape) in tensors.items()
        if "{expert}" in name and expert_role(name) == "expert.down"
    ]
    if not down:
        return None
    inside, shape = down[0]
    if any("{expert}" in name and len(shape_) != 2 for name, (_, shape_) in tensors.items()):
        raise _unknown("experts have tensors that are no matrices")
    home = inside.partition(".experts")[0]
    return Experts(home, count, shape[1])


def expert_role(name: str) -> str:
    """The role of one expert's tensor, by the names that transformers' experts have on disk.

    Raises:
        UnsupportedArch: it has another name.
    """
    leaf = name.split(".")[-2]
    roles = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down",
             "w1": "gate", "w3": "up", "w2": "down"}  # fmt: skip
    if leaf not in roles:
        raise _unknown(f"{name} is of experts, and its name tells no part of them")
    return f"expert.{roles[leaf]}"


def layer_set(small: Small, kinds: list[Kind], blocks: str) -> dict[str, Any]:
    """How the config says which blocks have experts: an entry of `layer_sets`.

    Raises:
        UnsupportedArch: no key was found that does.
    """
    config, dense, mixed = small.config, kinds[0].layers, kinds[1].layers
    for key in small.keys.listed:
        values = {str(config[key][layer]) for layer in mixed}
        if not values & {str(config[key][layer]) for layer in dense}:
            return {"of": key, "values": sorted(values)}
    for key, value in config.items():
        if isinstance(value, list | tuple) and list(value) == list(dense):
            return {"excluding": key}
    start = min(mixed)
    if mixed == tuple(range(start, len(dense) + len(mixed))):
        for key, value in config.items():
            if (
                type(value) is int
                and value == start
                and _boundary(config, key, blocks) == start + 1
            ):
                return {"first": key}
    raise _unknown(f"no key was found that says which blocks have experts: {list(mixed)} do")


def _boundary(config: Mapping[str, Any], key: str, blocks: str) -> int | None:
    """The first block with experts once a key is raised by one; None where that is no model."""
    try:
        there = shapes({**config, key: config[key] + 1})
    except Exception:  # a class refuses odd values in its own way
        return None
    numbers = [
        int(name.removeprefix(f"{blocks}.").partition(".")[0])
        for name in there
        if name.startswith(f"{blocks}.") and ".experts" in name
    ]
    return min(numbers, default=None)
