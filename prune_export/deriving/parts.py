"""Tells what the modules of a block are by what they do: `q`, `v`, `o`, `gate`, `down`, norms.

- A layer of attention is one whose channels move other positions, or that lies beside such.
- A channel of the *values* moves one feature of each head that reads it; one of the *keys* moves
  all features of these heads, at later positions too; one of the *queries* all those of one head,
  at its own position.
- What is gated doubles when its layer's outputs are doubled; the gate does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from prune_export.arch.dims import Dims
from prune_export.deriving.kinds import Experts
from prune_export.deriving.layers import (
    KEY,
    QUERY,
    Layer,
    Sizes,
    below,
    is_linear,
    leaf,
    transposed,
)
from prune_export.deriving.residual import flags_of, norms_of
from prune_export.deriving.watching import LENGTH, Moved, Seen, Watched, same

_NEAR: Final = 4
"""Heads have more than twice as many channels."""


@dataclass(frozen=True)
class Block:
    """What was found in one block.

    `norms` has a role and a dims string by module; `flags` are the table's own (`parallel` …);
    `notes` say why something stayed unknown. `mlp` is the width of the MLP, `shared` that of
    experts which all tokens share, 0 where none was found;
    `heads_told` says that it is known which head each channel of the attention belongs to.
    """

    layers: tuple[Layer, ...]
    norms: Mapping[str, tuple[str, str]]
    attention: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mlp: int = 0
    shared: int = 0
    heads_told: bool = False


def tell(watched: Watched, sizes: Sizes, experts: Experts | None = None) -> Block:
    """Finds the parts of a block; `sizes` are those of the axes, with `group` where it has one.

    Of `experts` only what chooses among them, and what all tokens share, is a layer here.
    """
    seen = watched.look()
    by_name = {one.name: one for one in seen}
    linear = [one for one in seen if one.name and is_linear(one.module)]
    routers = [one for one in linear if experts and _chooses(one, experts)]
    linear = [one for one in linear if one not in routers]
    names = [one.name for one in linear]
    watch = {*names, *(reader(name, seen) for name in names)}
    points = {one.name: _point(one, seen) for one in linear}
    first = {one.name: watched.move(points[one.name], 0, watch, _width(one)) for one in linear}
    mixing = [name for name in names if bool(first[name].block[:, 1:].any())]
    home = _home(mixing, [*names, *(one.name for one in routers)])
    inside = [name for name in names if name in mixing or below(name, home)]
    outside = [name for name in names if name not in inside]
    layers: list[Layer] = []
    notes: list[str] = []
    if mixing:
        end = reader(inside[-1], seen)
        last = {
            name: watched.move(points[name], LENGTH - 1, [end], _width(by_name[name]))
            for name in inside[:-1]
        }
        layers += _attention(inside, end, first, last, sizes, notes)
    else:
        notes.append("no attention was found: nothing in a block moves other positions")
    told = bool(mixing) and not notes
    width = _elements(by_name[outside[-1]]) // sizes["residual"] if outside else 0
    layers += _mlp(watched, outside, seen, first, {**sizes, "mlp": width}, notes)
    found = any(layer.role == "down" for layer in layers)
    if experts:
        layers = [_of_shared(layer) for layer in layers]
        layers += [_router(one) for one in routers]
    layers = [_laid(layer, by_name[layer.name]) for layer in layers]
    layers = _with_one_input(layers, by_name, notes)
    sizes = {**sizes, "mlp": width} if found else sizes
    down = next((layer.name for layer in layers if layer.role == "down"), None)
    end_of_mlp = experts.home if experts else down
    norms = dict(norms_of(watched, seen, layers, sizes, home, end_of_mlp))
    flags = flags_of(watched, seen, layers, home, end_of_mlp)
    width = width if found else 0
    mlp, shared = (0, width) if experts else (width, 0)
    return Block(tuple(layers), norms, home, flags, tuple(notes), mlp, shared, told)


def _chooses(seen: Seen, experts: Experts) -> bool:
    """Whether a layer scores the experts, or gives one number for what is shared."""
    rows = seen.module.weight
    assert isinstance(rows, torch.Tensor)
    return below(seen.name, experts.home) and rows.shape[0] in (1, experts.count)


def _router(seen: Seen) -> Layer:
    rows = seen.module.weight
    assert isinstance(rows, torch.Tensor)
    if rows.shape[0] == 1:
        return Layer(seen.name, "shared.router", "1", "residual")
    return Layer(seen.name, "router", "expert", "residual")


def _of_shared(layer: Layer) -> Layer:
    """The same layer, where it is one of an MLP, as one of the experts that all tokens share."""
    if layer.role not in ("gate", "up", "gate_up", "down"):
        return layer
    out, into = (text.replace("mlp", "shared") for text in (layer.out, layer.into))
    return replace(layer, role=f"shared.{layer.role}", out=out, into=into)


def reader(name: str, seen: Sequence[Seen]) -> str:
    """The module that first reads what a layer is given: itself, or a norm right before it."""
    own = next(one for one in seen if one.name == name)
    for one in seen:
        plain = one.name and not is_linear(one.module) and not list(one.module.children())
        if plain and any(True for _ in one.module.parameters()) and same(one.gave, own.given):
            wide = own.given.shape[-1] != own.gave.shape[-1] or one.name.count(".") > 0
            if wide and one.given.numel() == own.given.numel():
                return one.name
    return name


def _point(own: Seen, seen: Sequence[Seen]) -> str:
    """Where a layer's channels are moved: behind a norm over all of them, if there is one."""
    width = _width(own)
    for one in seen:
        gains = [value for value in one.module.parameters(recurse=False) if value.dim() == 1]
        norm = one.name and not is_linear(one.module) and gains and len(gains[0]) == width
        if norm and one.given.shape[-1] == width and same(one.given, own.gave):
            return one.name
    return own.name


def _elements(seen: Seen) -> int:
    weight = seen.module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.numel()


def _width(seen: Seen) -> int:
    return seen.gave.numel() // LENGTH


def _home(mixing: Sequence[str], names: Sequence[str]) -> str:
    """The module that all mixing layers, and not all layers, lie in; "" where there is none."""
    paths = [name.split(".")[:-1] for name in mixing]
    shared: list[str] = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    home = ".".join(shared)
    # A module around both attention and MLP is no home of one of them.
    return home if home and not all(below(name, home) for name in names) else ""


def _laid(layer: Layer, seen: Seen) -> Layer:
    return replace(layer, transposed=bool(transposed(seen)))


def _attention(
    inside: Sequence[str], end: str, first: Mapping[str, Moved], last: Mapping[str, Moved],
    sizes: Sizes, notes: list[str],
) -> Iterator[Layer]:  # fmt: skip
    query = QUERY if "group" in sizes else KEY
    heads, dim = sizes["kv"] * sizes.get("group", 1), sizes["dim"]
    yield Layer(inside[-1], "o", "residual", query)
    for name in inside[:-1]:
        # Features of what the output projection reads, `[channels, LENGTH, heads x dim]`.
        moved, own = first[name].inputs.get(end), last[name].inputs.get(end)
        if moved is None or own is None or moved.shape[-1] != heads * dim:
            notes.append(f"what {name} does in the attention is not understood")
            yield Layer(name, f"other.{leaf(name)}", "", "")
            continue
        reached = (moved.any(1) | own.any(1)).reshape(-1, heads, dim)
        kinds = _kinds(moved[:, 1:].any((1, 2)), reached)
        role = "".join(kind for kind in "qkv" if kind in kinds)
        if role in ("q", "k", "v", "qkv") and set(kinds) <= set(role):
            order = _layout(kinds, reached, sizes, query)
            if order is None:
                notes.append(f"the order of the heads in {name} is not understood")
                order = _of_length(len(kinds), sizes, query)
            yield Layer(name, role, order, "residual")
        elif set(kinds) == {"p"} and len(kinds) == heads * dim:
            # It multiplies what the output projection reads, as a gate does.
            yield Layer(name, f"other.{leaf(name)}", query, "residual")
        else:
            notes.append(f"what {name} does in the attention is not understood")
            yield Layer(name, f"other.{leaf(name)}", "", "")


def _of_length(length: int, sizes: Sizes, query: str) -> str:
    """Dims of a length alone, of heads in no particular order; "" where none fits."""
    ways = (query, KEY, f"{query}+{KEY}+{KEY}", "(kv 3 dim)")
    return next((text for text in ways if Dims.parse(text).shape(sizes) == (length,)), "")


def _kinds(mixes: torch.Tensor, reached: torch.Tensor) -> list[str]:
    """For each channel `q`, `k`, `v`, `p` (a feature at its own position) or `?`."""
    per_head = reached.sum(-1)
    most, heads = per_head.amax(-1), (per_head > 0).sum(-1)
    found = []
    for mixing, features, count in zip(mixes.tolist(), most.tolist(), heads.tolist(), strict=True):
        if features == 0:
            found.append("?")
        elif features == 1:
            found.append("v" if mixing else "p" if count == 1 else "?")
        else:
            found.append("k" if mixing else "q" if count == 1 else "?")
    # A channel that happens to do nothing (the slowest turn of a rotary embedding at a first
    # position) is what its neighbours are.
    idle = ~reached.any((1, 2))
    told = [index for index in range(len(found)) if not bool(idle[index])]
    for index in range(len(found)) if told else ():
        if bool(idle[index]):
            found[index] = found[min(told, key=lambda other: abs(other - index))]
    # Where attention looks at one position only, a channel seems to move less than it does.
    near = [found[max(0, index - _NEAR) : index + _NEAR + 1] for index in range(len(found))]
    return [max(own, key=lambda kind: (own.count(kind), kind == found[index]))
            for index, own in enumerate(near)]  # fmt: skip


def _layout(kinds: Sequence[str], reached: torch.Tensor, sizes: Sizes, query: str) -> str | None:
    """The dims of a projection's outputs that say which heads each channel belongs to."""
    groups = reached.shape[1] // sizes["kv"]
    # [channels, kv]: which groups of heads follow a channel.
    actual = reached.any(-1).reshape(len(kinds), sizes["kv"], groups).any(-1)
    width = sizes["kv"] * sizes["dim"]
    wide = width * groups
    thirds = {"(kv 3 dim)": lambda c: c // sizes["dim"] % 3, "(3 kv dim)": lambda c: c // width}
    ways: dict[str, Any] = {query: None, KEY: None} | (thirds if groups == 1 else {})
    ways[f"{query}+{KEY}+{KEY}"] = lambda c: 0 if c < wide else 1 if c < wide + width else 2
    for text, kind_of in ways.items():
        dims = Dims.parse(text)
        if dims.shape(sizes) != (len(kinds),):
            continue
        if kind_of and any("qkv"[kind_of(c)] != kind for c, kind in enumerate(kinds)):
            continue
        if not kind_of and len(set(kinds)) > 1:
            continue
        meant = torch.zeros_like(actual)
        for head in range(sizes["kv"]):
            for _, positions in dims.kept("kv", [head], sizes):
                meant[positions, head] = True
        if not bool((actual & ~meant).any()):
            return text
    return None


def _mlp(
    watched: Watched, outside: Sequence[str], seen: Sequence[Seen], first: Mapping[str, Moved],
    sizes: Sizes, notes: list[str],
) -> Iterator[Layer]:  # fmt: skip
    if not outside:
        return
    down, rest = outside[-1], outside[:-1]
    end, width = reader(down, seen), sizes["mlp"]
    readers = [name for name in rest if bool(first[name].inputs[end].any())]
    plain = watched.without({}, [end])[end]
    if not readers or plain.numel() != width * LENGTH:
        for name in outside:
            notes.append(f"what {name} does is not understood")
            yield Layer(name, f"other.{leaf(name)}", "", "")
        return
    yield Layer(down, "down", "residual", "mlp")
    for name in rest:
        order = _order(first[name].inputs[end].any(1), width)
        doubled = watched.without({name: lambda value: value * 2}, [end])[end]
        if name not in readers or order is None:
            notes.append(f"what {name} does is not understood")
            yield Layer(name, f"other.{leaf(name)}", "", "")
        elif order != "mlp":
            yield Layer(name, "gate_up", order, "residual")
        elif len(readers) == 1 or same(doubled, plain * 2):
            yield Layer(name, "up", "mlp", "residual")
        else:
            yield Layer(name, "gate", "mlp", "residual")


def _order(moved: torch.Tensor, width: int) -> str | None:
    """The dims of a layer whose channels move features `[channels, mlp]` of what `down` reads."""
    count = len(moved)
    index = torch.arange(count)
    ways = {"mlp": index, "mlp+mlp": index % width, "(mlp 2)": index // 2}
    for text, feature in ways.items():
        if Dims.parse(text).shape({"mlp": width}) == (count,):
            meant = torch.zeros_like(moved)
            meant[index, feature] = True
            if not bool((moved & ~meant).any()) and bool(moved.any()):
                return text
    return None


def _with_one_input(
    layers: Sequence[Layer], seen: Mapping[str, Seen], notes: list[str]
) -> list[Layer]:
    """Layers of one group must read one input: statistics of it are gathered once."""
    found = list(layers)
    for group in (("q", "k", "v"), ("gate", "up"), ("shared.gate", "shared.up")):
        own = [layer for layer in found if layer.role in group]
        if len(own) > 1 and not all(
            same(seen[own[0].name].given, seen[layer.name].given) for layer in own
        ):
            notes.append(f"{', '.join(layer.name for layer in own)} read different inputs")
            found = [
                replace(layer, role=f"other.{leaf(layer.name)}") if layer in own else layer
                for layer in found
            ]
    return found
