"""Writes down what was found as a table: rows, axes, and what each config key means."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune_export.arch.conditions import keys_of
from prune_export.arch.table import common, tables
from prune_export.deriving.instances import prompt
from prune_export.deriving.kinds import Experts, Stored, expert_role
from prune_export.deriving.layers import Sizes, below, is_linear, size_dims
from prune_export.deriving.parts import Block
from prune_export.deriving.small import Small
from prune_export.deriving.watching import LENGTH, first_tensor, same
from prune_export.errors import UnsupportedArch

_OFTEN: Final = 3
"""A key that so many tables of ours know, and none limits, changes no cut."""


@cache
def harmless() -> frozenset[str]:
    """Config keys that many families of ours know to need no change, and none limits."""
    counts: dict[str, int] = {}
    limited: set[str] = set()
    for table in {own.family: own for own in tables().values() if own.derived is None}.values():
        rules = table.config
        for key in rules.known:
            counts[key] = counts.get(key, 0) + 1
        limited |= {*rules.accepts, *rules.derives, *rules.depth_requires, *table.depth_keys()}
        # What some family computes the residual stream with, another may as well.
        limited |= keys_of(table.added_when or "") | {table.added_times or ""}
        limited |= keys_of(table.parallel) if isinstance(table.parallel, str) else set()
    return frozenset(key for key, count in counts.items() if count >= _OFTEN) - limited


@dataclass(frozen=True)
class Axes:
    """The axes of a model: the expression of each over config keys, and its size when small."""

    of: Mapping[str, dict[str, Any]]
    sizes: Sizes
    writes: Mapping[str, str]

    def to_table(self) -> dict[str, dict[str, Any]]:
        return dict(self.of)


def head_sizes(small: Small) -> dict[str, int]:
    """The sizes of the axes that standard keys say."""
    key, config = small.keys.standard, small.config
    heads = config[key["heads"]]
    kv = config[key["kv"]] if "kv" in key else heads
    dim = config[key["dim"]] if "dim" in key else config[key["residual"]] // heads
    found = {"residual": config[key["residual"]], "kv": kv, "dim": dim}
    return found | ({"group": heads // kv} if "kv" in key else {})


def axes_of(
    small: Small,
    blocks: Sequence[Block],
    experts: Experts | None,
    written: Mapping[str, str],
    positions: int | None,
) -> Axes:
    """Finds the config expression of every axis; `written` names a tensor of some, in memory.

    Raises:
        UnsupportedArch: no key says how wide an MLP or an expert is.
    """
    key, sizes = small.keys.standard, {"vocab": small.config[small.keys["vocab"]]}
    sizes |= head_sizes(small)
    plain: dict[str, dict[str, Any]] = {
        "vocab": {"size": key["vocab"]},
        "residual": {"size": key["residual"]},
    }
    writes = {}
    if positions is not None:
        said = _said(small, positions)
        if said:
            plain["positions"], sizes["positions"] = {"size": said}, positions
    widths = {
        "mlp": (max(block.mlp for block in blocks), "per_layer"),
        "shared": (max(block.shared for block in blocks), "per_layer"),
        "expert": (experts.count if experts else 0, "per_layer"),
        "moe": (experts.width if experts else 0, "per_expert"),
    }
    for axis, (wide, where) in widths.items():
        if not wide:
            continue
        said = _product(small, wide, written[axis]) if axis in written else None
        said = said or _said(small, wide)
        if said is None:
            raise UnsupportedArch(
                "config.json",
                f"no key says the size of `{axis}` ({wide} in a small model)",
                "write a table by hand (docs/architectures.md)",
            )
        plain[axis], sizes[axis] = {"size": said, where: True}, wide
        first = said.partition(" | ")[0]
        # With fewer experts others would be chosen: that has rules of its own.
        if first.isidentifier() and axis != "expert":
            writes[first] = axis
    heads = key["heads"]
    if "kv" in key:
        plain["kv"] = {"size": key["kv"], "per_layer": True}
        plain["group"] = {"size": f"{heads} / {key['kv']}", "per_layer": True}
        writes |= {key["kv"]: "kv", heads: "kv * group"}
    else:
        plain["kv"] = {"size": heads, "per_layer": True}
        writes |= {heads: "kv"}
    over = f"{key['residual']} / {heads}"
    plain["dim"] = {"size": f"{key['dim']} | {over}" if "dim" in key else over}
    if "dim" in key:
        writes[key["dim"]] = "dim"
    return Axes(plain, sizes, writes)


def _product(small: Small, size: int, name: str) -> str | None:
    """The product of all keys that a tensor follows, if that is its width."""
    keys = [key for key, names in small.moved.items() if name in names]
    values = [small.config[key] for key in keys]
    fits = bool(keys) and all(type(value) is int for value in values) and prod(values) == size
    return " * ".join(keys) if fits else None


def _said(small: Small, size: int) -> str | None:
    """The expression over config keys that says a size of the small model."""
    config, wide = small.config, small.keys["residual"]
    for key in small.keys.others:
        if config[key] == size:
            return key
    for key, value in config.items():
        many = type(value) is int and value > 1 and value * config[wide] == size
        if many and key in small.keys.others:
            return f"{key} * {wide}"
    for key in small.keys.others:
        for other, value in config.items():
            if type(value) is int and value > 0 and config[key] and config[key] * value == size:
                return f"{key} * {other}"
    unset = next((f"{key} | " for key in small.keys.others if config[key] is None), "")
    if size % config[wide] == 0:
        return f"{unset}{size // config[wide]} * {wide}"
    return None


def block_rows(
    block: Block, stored: Stored, sizes: Sizes, buffers: Collection[str]
) -> Iterator[dict[str, Any]]:
    """The rows of a block, from its tensors' names on disk, in memory, and shapes."""
    layers = {layer.name: layer for layer in block.layers}
    routers = {layer.name for layer in block.layers if layer.role == "router"}
    for name, (inside, shape) in stored.items():
        if "{expert}" in name:
            role = expert_role(name)
            dims = "residual moe" if role == "expert.down" else "moe residual"
            yield {"name": name, "role": role, "dims": dims}
            continue
        path, _, leaf = inside.rpartition(".")
        layer = layers.get(path)
        around = any(below(router, path) for router in routers)
        routes = path in routers or (around and shape == (sizes.get("expert"),))
        if routes and leaf not in ("weight", "bias"):
            role = "buffer.correction" if inside in buffers else "router.bias"
            yield {"name": name, "role": role, "dims": "expert"}
            continue
        if layer is not None and leaf in ("weight", "bias"):
            width = shape[-1 if layer.transposed else 0]
            heads = bool(block.attention) and path.startswith(f"{block.attention}.")
            out = layer.out or size_dims(width, sizes, within_heads=heads)
            into = layer.into or size_dims(sum(shape) - width, sizes, within_heads=heads)
            dims = f"{into} {out}" if layer.transposed else f"{out} {into}"
            role = layer.role if leaf == "weight" else f"{layer.role}.bias"
            yield {"name": name, "role": role, "dims": dims if leaf == "weight" else out}
            continue
        role, dims = block.norms.get(path, (f"other.{leaf}", ""))
        if path in block.norms and len(shape) == 1:
            yield {"name": name, "role": f"{role}.bias" if leaf == "bias" else role, "dims": dims}
            continue
        within = bool(block.attention) and inside.startswith(f"{block.attention}.")
        if "sink" in leaf and len(shape) == 1:
            role = "sinks"
        yield {"name": name, "role": role, "dims": _dims(shape, sizes, within)}


def _dims(shape: Sequence[int], sizes: Sizes, within_heads: bool) -> str:
    return " ".join(size_dims(size, sizes, within_heads=within_heads) for size in shape)


def config_rules(true: Mapping[str, Any], small: Small, axes: Axes) -> dict[str, Any]:
    """What each key means: sizes and lists are known, what no one vouches for is kept as it is."""
    skip = {small.keys["layers"], *small.keys.listed, *common().keys()}
    sized = {
        word
        for axis in axes.of.values()
        for word in axis["size"].replace("|", " ").replace("*", " ").replace("/", " ").split()
    }
    known, accepts = [], {}
    for key, value in true.items():
        if key in skip or key in sized:
            continue
        if key in harmless() or key in small.changed or key in small.keys.others:
            known.append(key)
        else:
            accepts[key] = [value]
    rules: dict[str, Any] = {"known": sorted(known), "accepts": accepts}
    if small.keys.listed:
        rules["per_layer"] = sorted(small.keys.listed)
    return rules | {"writes": dict(axes.writes)}


class _Complex(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """Notes whether complex numbers are computed with."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_complex():
            self.found = True
        return out


@dataclass(frozen=True)
class Outside:
    """What lies outside of the blocks: module paths, in the order of their calls, and facts."""

    before: tuple[str, ...]
    final_norm: str | None
    norm: str
    norm_offset: float
    scaled: bool
    per_sample: tuple[str, ...]
    untraceable: str


def look_outside(model: Any, blocks: str, sizes: Sizes, heads: int) -> Outside:
    """Runs a model once, and notes what it does before the first block and after the last."""
    calls: list[tuple[str, nn.Module, torch.Tensor | None, torch.Tensor | None]] = []
    entered: list[torch.Tensor] = []
    per_sample: list[str] = []
    named = {module: name for name, module in model.named_modules()}
    first, samples = model.get_submodule(blocks)[0], 2

    def note(module: nn.Module, inputs: Any, _named: Any, output: Any) -> None:
        if not list(module.children()):
            calls.append((named[module], module, first_tensor(inputs), first_tensor(output)))

    def enter(_module: nn.Module, inputs: Any, more: Any) -> None:
        states = first_tensor(inputs)
        entered.append(more["hidden_states"] if states is None else states)
        for key, value in more.items():
            tensor = isinstance(value, torch.Tensor) and value.dim() > 1
            if tensor and value.shape[0] == samples * heads != samples:
                per_sample.append(key)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules()]
    hooks.append(first.register_forward_pre_hook(enter, with_kwargs=True))
    ids, mode = prompt(sizes["vocab"])[:, :LENGTH], _Complex()  # type: ignore[no-untyped-call]
    with torch.no_grad(), mode:
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    inside = [index for index, call in enumerate(calls) if call[0].startswith(f"{blocks}.")]
    start, end = min(inside), max(inside)
    before = tuple(
        dict.fromkeys(name for name, module, _, _ in calls[:start] if list(module.parameters()))
    )
    head = model.get_output_embeddings()
    read = next((given for _, module, given, _ in calls if module is head), None)
    final = None
    for name, module, _, gave in calls[end + 1 :]:
        if module is not head and gave is not None and read is not None and same(gave, read):
            final = name
            break
    embedding = model.get_input_embeddings()
    rows = nn.functional.embedding(ids, embedding.weight.detach())
    scale = sizes["residual"] ** 0.5
    scaled = rows.shape == entered[0].shape and same(rows * scale, entered[0])
    why = "computes with complex numbers" if mode.found else untraceable(model, ids)
    kind, offset = _norm(model, final, blocks, sizes["residual"])
    return Outside(before, final, kind, offset, scaled, tuple(per_sample), why)


_PROBE: Final = "prune_export_probe"
_NOT_IN_GRAPHS: Final = ("s_aux", "position_bias")
"""Arguments of attention that no exporter's graph has."""


def untraceable(model: Any, ids: torch.Tensor) -> str:
    """Why no exporter's graph can hold the model's attention; "" where nothing is known against it.

    Exporters put their own attention into transformers' interface: a model must use it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    called: set[str] = set()

    def probe(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **more: Any
    ) -> Any:
        called.update(name for name, one in more.items() if one is not None)
        called.add("")
        more = {name: one for name, one in more.items() if name not in _NOT_IN_GRAPHS}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, sdpa_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = _PROBE
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    except Exception as error:  # an old class, or one that takes some attentions only
        return f"its attention cannot be replaced ({type(error).__name__})"
    finally:
        model.config._attn_implementation = before
    if not called:
        return "its attention is none of transformers' interface"
    taken = [name for name in _NOT_IN_GRAPHS if name in called]
    return f"its attention takes `{taken[0]}`" if taken else ""


def _norm(model: Any, final: str | None, blocks: str, width: int) -> tuple[str, float]:
    """The kind of a model's norms, by the final one or that of a block, and its offset of gains."""
    norm = model.get_submodule(final) if final else None
    if norm is None:
        norm = next(
            (
                module
                for module in model.get_submodule(blocks)[0].modules()
                if not list(module.children())
                and not is_linear(module)
                and any(own.shape == (width,) for own in module.parameters())
            ),
            None,
        )
    if norm is None:
        return "rms", 0.0
    states = torch.randn(3, width)
    with torch.no_grad():
        moved = bool((norm(states + 5) - norm(states)).abs().max() > 1e-3)
        weight, offset = getattr(norm, "weight", None), 0.0
        if isinstance(weight, torch.Tensor):
            kept, bias = weight.clone(), getattr(norm, "bias", None)
            weight.zero_()
            out = norm(states) - (0 if bias is None else bias)
            offset = 1.0 if bool(out.abs().max() > 1e-3) else 0.0
            weight.copy_(kept)
    return ("rms" if moved else "layer"), offset
