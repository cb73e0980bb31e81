"""Tells what stands around a block's parts: its norms, and how they are added to the stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prune_export.deriving.layers import (
    INTO_MLP,
    Layer,
    Sizes,
    below,
    is_linear,
    leaf,
    size_dims,
)
from prune_export.deriving.watching import Seen, Watched, first_tensor, same


def norms_of(
    watched: Watched,
    seen: Sequence[Seen],
    layers: Sequence[Layer],
    sizes: Sizes,
    home: str,
    end_of_mlp: str | None,
) -> Iterator[tuple[str, tuple[str, str]]]:
    """The role and the dims of each norm of a block, by its module."""
    by_role = {layer.role: layer.name for layer in layers} | {"down": end_of_mlp or ""}
    by_name = {one.name: one for one in seen}
    into_attention = [
        layer.name for layer in layers if below(layer.name, home) and layer.role != "o"
    ]
    into_mlp = [layer.name for layer in layers if layer.role in INTO_MLP]
    names = [layer.name for layer in layers]
    for one in seen:
        own = list(one.module.parameters(recurse=False))
        if not one.name or not own or any(value.dim() != 1 for value in own):
            continue
        if list(one.module.children()) or is_linear(one.module):
            continue
        size = len(own[0])
        dims = size_dims(size, sizes, within_heads=below(one.name, home))
        role = f"other.{leaf(one.name)}"
        for norm, source in (("norm.attn.out", "o"), ("norm.mlp.out", "down"),
                             ("norm.q", "q"), ("norm.k", "k")):  # fmt: skip
            maker = by_name.get(by_role.get(source, ""))
            if maker is not None and _same_values(maker.gave, one.given):
                role = norm
        inner = below(one.name, home)
        if role.startswith("other.") and size == sizes["residual"] and not inner:
            noisy = watched.without({one.name: _with_noise}, names)
            plain = watched.without({}, names)
            moved = [name for name in names if not same(noisy[name], plain[name])]
            if any(name in moved for name in into_attention):
                role = "norm.attn"
            elif any(name in moved for name in into_mlp):
                role = "norm.mlp"
        yield one.name, (role, dims)


def _with_noise(value: torch.Tensor) -> torch.Tensor:
    return value + torch.randn(value.shape[-1])


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values in some order: heads are turned about."""
    return one.numel() == other.numel() and same(one.flatten().sort()[0], other.flatten().sort()[0])


def flags_of(
    watched: Watched,
    seen: Sequence[Seen],
    layers: Sequence[Layer],
    home: str,
    end_of_mlp: str | None,
) -> dict[str, Any]:
    """What a table says of how a block adds its parts, by moving what they give."""
    by_role = {layer.role: layer.name for layer in layers}
    found: dict[str, Any] = {"tuple_blocks": next(one for one in seen if not one.name).in_tuple}
    out, down = by_role.get("o"), end_of_mlp
    if out is None or down is None:
        return found | {"added": False}
    into = [layer.name for layer in layers if layer.role in INTO_MLP]
    names = [out, down]
    step = torch.linspace(0.5, 1.5, next(one for one in seen if not one.name).gave.shape[-1])
    plain = watched.without({}, into)
    moved = watched.without({out: lambda value: value + _wide(step, value)}, into)
    found["parallel"] = all(same(plain[name], moved[name]) for name in into)
    parent = down if not is_linear(watched.modules[down]) else down.rpartition(".")[0]
    mlp = next((one for one in seen if parent and one.name == parent), None)
    found["tuple_mlp"] = bool(mlp and mlp.in_tuple)
    # With the MLP's output held still, a step of either comes through whole, or times a number.
    still = {one.name: one.gave for one in seen if one.name in names}
    times = set()
    for name in names:
        held = {other: (lambda _value, kept=still[other]: kept) for other in names}
        base = watched.without(held, [])[""]
        shifted = held | {name: lambda _value, kept=still[name]: kept + _wide(step, kept)}
        change = watched.without(shifted, [])[""] - base
        ratio = (change / step).reshape(-1)
        even = bool((ratio - ratio.mean()).abs().max() < 1e-3 * max(1.0, float(ratio.abs().max())))
        times.add(round(float(ratio.mean()), 4) if even else None)
    found["added"] = len(times) == 1 and None not in times
    found["times"] = next(iter(times)) if found["added"] else None
    if home:
        blank = {out: torch.zeros_like}
        module = watched.modules[home]
        kept: list[torch.Tensor] = []

        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            value = first_tensor(output)
            assert value is not None
            kept.append(value.clone())

        handle = module.register_forward_hook(note)
        watched.without(blank, [])
        handle.remove()
        found["parts_add"] = bool(kept and kept[0].any())
    return found


def _wide(step: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return step.expand_as(value)
