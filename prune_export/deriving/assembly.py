"""Puts what was found of a model together as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import nn

from prune_export import __version__
from prune_export.deriving.instances import build, config_class, quietly
from prune_export.deriving.kinds import Kind, Stored, layer_set
from prune_export.deriving.layers import Sizes
from prune_export.deriving.parts import Block
from prune_export.deriving.small import Small
from prune_export.deriving.table import Axes, Outside, axes_of, block_rows, config_rules


@dataclass(frozen=True)
class Found:
    """What was found of a model; `told` has a block of each kind."""

    full: Mapping[str, Any]
    small: Small
    model: Any
    blocks: str
    stored: Stored
    kinds: list[Kind]
    told: list[Block]
    outside: Outside

    def rows(self, sizes: Sizes) -> Iterator[dict[str, Any]]:
        """The rows of the blocks: those of dense ones alone, then of those with experts."""
        last, alone = self.kinds[-1], len(self.kinds) == 1
        for kind, block in zip(self.kinds, self.told, strict=True):
            start = f"{self.blocks}.{kind.layers[0]}."
            buffers = {name.removeprefix(start) for name, _ in self.model.named_buffers()}
            for row in block_rows(block, kind.tensors, sizes, buffers):
                if alone:
                    yield row
                elif kind is last:
                    common = row["name"] in self.kinds[0].tensors
                    yield row if common else row | {"layers": "sparse"}
                elif row["name"] not in last.tensors:
                    yield row | {"layers": "not sparse"}


def table_of(found: Found) -> dict[str, Any]:
    """The table, as YAML says it."""
    full, small, model, outside = found.full, found.small, found.model, found.outside
    block, stored, blocks = found.told[-1], found.stored, found.blocks
    embeddings = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    positions = next(
        (
            module.num_embeddings
            for name, module in embeddings.items()
            if module is not model.get_input_embeddings() and name in outside.before
        ),
        None,
    )
    axes, offset = _positioned(small, found, positions)
    flags = dict(block.flags)
    said: dict[str, Any] = {
        "family": str(full["model_type"]),
        "model_types": [str(full["model_type"])],
        "architectures": [type(model).__name__],
        "source": f"derived by prune_export {__version__}, transformers {version('transformers')}",
        "layers": small.keys["layers"],
        "blocks": blocks,
        "final_norm": outside.final_norm,
        "norm": outside.norm,
        "embeddings": list(outside.before),
        "axes": axes.to_table(),
        "head": list(_outer(model, blocks, stored, outside, axes, offset, before=True)),
        "block": list(found.rows(axes.sizes)),
        "tail": list(_outer(model, blocks, stored, outside, axes, offset, before=False)),
        "config": config_rules(full, small, axes),
        "tiny": {"config": _tiny(small)},
    }
    if len(found.kinds) > 1:
        chosen = layer_set(small, found.kinds, blocks)
        keys, rules = {one for one in chosen.values() if isinstance(one, str)}, said["config"]
        said["layer_sets"] = {"sparse": chosen}
        rules["known"] = [key for key in rules["known"] if key not in keys]
        rules["accepts"] = {key: own for key, own in rules["accepts"].items() if key not in keys}
    for flag in ("tuple_blocks", "tuple_mlp", "parallel", "parts_add"):
        if flags.get(flag):
            said[flag] = True
    times = flags.get("times")
    if not flags.get("added"):
        said["added_when"] = f"model_type != {full['model_type']}"
    elif times is not None and abs(times - 1) > 1e-6:
        key = next((k for k, v in small.config.items() if type(v) is float and v == times), None)
        if key:
            said["added_times"] = key
        else:
            said["added_when"] = f"model_type != {full['model_type']}"
    if outside.norm_offset:
        said["norm_offset"] = outside.norm_offset
    if outside.scaled:
        said["scaled_embeddings"] = True
    if outside.per_sample:
        said["per_sample"] = list(outside.per_sample)
    if outside.untraceable:
        said["untraceable"] = outside.untraceable
    if block.notes:
        said["notes"] = "; ".join(block.notes)
    return said


def _positioned(small: Small, found: Found, rows: int | None) -> tuple[Axes, int]:
    """The axes, and how many rows there are beyond the positions that a config key says."""
    experts, written = found.kinds[-1].experts, {}
    for kind, block in zip(found.kinds, found.told, strict=True):
        for layer in block.layers:
            if layer.role in ("down", "shared.down"):
                axis = "mlp" if layer.role == "down" else "shared"
                written[axis] = f"{found.blocks}.{kind.layers[0]}.{layer.name}.weight"
    if rows is not None:
        for beyond in (0, 1, 2):
            axes = axes_of(small, found.told, experts, written, rows - beyond)
            if "positions" in axes.of and axes.of["positions"]["size"].isidentifier():
                return axes, beyond
    return axes_of(small, found.told, experts, written, None), 0


def _tiny(small: Small) -> dict[str, Any]:
    """The changes that make the class's own defaults the small config."""
    with quietly():
        plain = config_class(str(small.config["model_type"]))().to_dict()
    skip = ("model_type", "transformers_version", "architectures", "dtype", "torch_dtype")
    return {
        key: value
        for key, value in small.config.items()
        if key not in skip
        and (key not in plain or plain[key] != value)
        and not key.endswith("_token_id")
    }


def _outer(
    model: Any,
    blocks: str,
    stored: Stored,
    outside: Outside,
    axes: Axes,
    beyond: int,
    *,
    before: bool,
) -> Iterator[dict[str, Any]]:
    """The rows of tensors outside of the blocks, those of before the first or of after the last."""
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = {module: name for name, module in model.named_modules()}
    disk = {inside: name for name, (inside, _) in stored.items()}
    embedding = f"{named[embed]}.weight"
    embedding, tied = disk.get(embedding, embedding), _tied_key(model)
    for inside, tensor in model.state_dict(keep_vars=True).items():
        if inside.startswith(f"{blocks}."):
            continue
        name = disk.get(inside, inside)
        path, _, leaf = inside.rpartition(".")
        module = model.get_submodule(path)
        if (path in outside.before) is not before:
            continue
        dims = " ".join(
            "residual" if size == axes.sizes["residual"] else
            "vocab" if size == axes.sizes["vocab"] else str(size)
            for size in tensor.shape
        )  # fmt: skip
        row: dict[str, Any] = {"name": name, "dims": dims}
        suffix = ".bias" if leaf == "bias" else ""
        if module is embed:
            row["role"] = "embed"
        elif module is head:
            row["role"] = f"head{suffix}"
            if not suffix:
                row |= {"tied_to": embedding} | ({"tied_when": tied} if tied else {})
        elif path == outside.final_norm:
            row["role"] = f"norm.final{suffix}"
        elif isinstance(module, nn.Embedding) and "positions" in axes.sizes:
            row["role"] = "position"
            more = f"{beyond}+" if beyond else ""
            row["dims"] = f"{more}positions residual"
        elif path in outside.before and tensor.dim() == 1:
            row["role"] = f"norm.embed{suffix}"
        else:
            row["role"] = f"other.{leaf}"
        yield row


def _tied_key(model: Any) -> str | None:
    """The config key that ties the head; None for a class that always does, or has no such key."""
    config = model.config.to_dict()
    said = {}
    for tie in (False, True):
        made = build({**config, "tie_word_embeddings": tie}, "meta")
        said[tie] = made.get_output_embeddings().weight is made.get_input_embeddings().weight
    return "tie_word_embeddings" if said[True] and not said[False] else None
