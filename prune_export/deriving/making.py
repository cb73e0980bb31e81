"""Derives a table from a config, and proves it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from prune_export import __version__
from prune_export.arch import Arch
from prune_export.arch.table import Derivation, Table
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.calibrate.streaming.layerwise_model import _Names as Names
from prune_export.checkpoint import Checkpoint
from prune_export.deriving import proof
from prune_export.deriving.instances import (
    Instance,
    build,
    config_class,
    prompt,
    quietly,
    random_instance,
    randomize,
)
from prune_export.deriving.kinds import BY_HAND, Kind, Stored, kinds_of, layer_set, stored_names
from prune_export.deriving.parts import Block, Sizes, tell
from prune_export.deriving.proof import Check, Disproved, checked
from prune_export.deriving.small import Small, of_depth, shapes, shrunk
from prune_export.deriving.table import (
    Axes,
    Outside,
    axes_of,
    block_rows,
    config_rules,
    head_sizes,
    look_outside,
)
from prune_export.deriving.watching import Watched
from prune_export.errors import PruneExportError, UnsupportedArch

_WIDTH_KEYS: Final = {
    "MLP width": ("mlp",),
    "heads": ("kv", "group", "dim"),
    "experts' width": ("moe",),
    "shared expert's width": ("shared",),
}


@dataclass(frozen=True)
class Derived:
    """A table that was derived, all checks of it, and how long that took.

    `table` is what was proven: uses that were not are left out of it, and stand in its `derived`.
    """

    table: Table
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold, and without which nothing is done with a model."""
        optional = proof.WIDTHS.values()
        return tuple(one for one in self.checks if not one.ok and one.what not in optional)


def derive(full: Mapping[str, Any], scratch: Path | None = None) -> Derived:
    """Derives and proves a table for the model type of a full config.

    `Derived.failed` says what is disproved: then the table is a start, not to be used.

    Raises:
        UnsupportedArch: no table can be made at all, and why.
    """
    began = time.perf_counter()
    refuse_unknown_type(full)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        torch.set_num_threads(1)
        try:
            table, checks, notes = _derived(full, Path(folder))
        finally:
            torch.set_num_threads(threads)
    return Derived(table, checks, notes, time.perf_counter() - began)


def prove_table(table: Table) -> tuple[list[Check], float]:
    """Proves a table of any origin on the tiny models that it names, as ours are in `tests/arch`.

    Raises:
        UnsupportedArch: transformers has no such model, or refuses the tiny config.
    """
    began = time.perf_counter()
    torch.set_num_threads(1)
    found: list[Check] = []
    for model_type in table.model_types:
        refuse_unknown_type({"model_type": model_type})
        for name, changes in {"plain": {}, **table.tiny.variants}.items():
            words = [model_type if len(table.model_types) > 1 else "", name]
            label = ", ".join(filter(None, words)) if len(table.tiny.variants) else ""
            with tempfile.TemporaryDirectory() as folder:
                config = {**table.tiny.config, **changes, "model_type": model_type}
                try:
                    made = random_instance(config, Path(folder) / "small", table)
                except PruneExportError:
                    raise
                except Exception as error:
                    raise UnsupportedArch(
                        f"{table.family}  tiny.{name}",
                        f"transformers cannot make this model: {type(error).__name__}: {error}",
                        "correct `tiny` in the table",
                    ) from error
                checks = [*proof.prove(made, Path(folder)),
                          checked("blocks one at a time", partial(_streamed, made))]  # fmt: skip
            found += [replace(one, what=f"{label}: {one.what}") if label else one for one in checks]
    return found, time.perf_counter() - began


def refuse_unknown_type(full: Mapping[str, Any]) -> None:
    """Refuses a model type that transformers has no causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = str(full.get("model_type"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedArch(
            "config.json  model_type",
            f"got {model_type!r}, of which transformers has no causal language model of its own",
            "code that a checkpoint brings is never run; a table is of no use without the model",
        )


def _derived(
    full: Mapping[str, Any], folder: Path
) -> tuple[Table, tuple[Check, ...], tuple[str, ...]]:
    small = shrunk(full)
    model = build(small.config)
    randomize(model)
    blocks = _blocks(model, small.config[small.keys["layers"]])
    sizes = head_sizes(small) | {"vocab": small.config[small.keys["vocab"]]}
    with quietly():
        model.save_pretrained(folder / "names")
    stored = stored_names(folder / "names", model)
    kinds = kinds_of(stored, blocks)
    told = [
        tell(Watched(model, blocks, kind.layers[0], sizes["vocab"]), sizes, kind.experts)
        for kind in kinds
    ]
    outside = look_outside(model, blocks, sizes, small.config[small.keys["heads"]])
    said, block = _table(_Found(full, small, model, blocks, stored, kinds, told, outside)), told[-1]
    made = random_instance(small.config, folder / "small", Table.model_validate(said))
    checks = [*proof.prove(made, folder), *_more(full, small, made)]
    if not block.heads_told:
        why = next((note for note in block.notes), "no attention was found")
        checks = [
            Check(one.what, False, why, refused=True) if one.what == proof.WIDTHS["kv"] else one
            for one in checks
        ]
    return _with_proof(said, checks), tuple(checks), block.notes


def _with_proof(said: dict[str, Any], checks: list[Check]) -> Table:
    """The table without the uses that were not proven, and with what was."""
    unproven = {one.what: one.found for one in checks if not one.ok}
    lost = {axis for what, axes in _WIDTH_KEYS.items() if what in unproven for axis in axes}
    writes = {
        key: text
        for key, text in said["config"]["writes"].items()
        if not lost & set(text.replace("*", " ").split())
    }
    proven = [f"{one.what} ({one.found})" for one in checks if one.ok]
    derived = Derivation(transformers=version("transformers"), proven=proven, unproven=unproven)
    return Table.model_validate(
        said | {"config": said["config"] | {"writes": writes}, "derived": derived}
    )


def _blocks(model: Any, layers: int) -> str:
    """The path of the list of blocks.

    Raises:
        UnsupportedArch: there is no such list, or there are several.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    ]
    lists = [one for one in lists if not any(one.startswith(f"{other}.") for other in lists)]
    if len(lists) != 1:
        raise UnsupportedArch(
            "config.json  model_type",
            f"a model of {layers} layers has {len(lists)} lists of {layers} blocks"
            + (f" ({', '.join(lists)})" if lists else "")
            + ", expected one whose blocks run one after the other",
            BY_HAND,
        )
    return str(lists[0])


@dataclass(frozen=True)
class _Found:
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


def _table(found: _Found) -> dict[str, Any]:
    full, small, model, outside = found.full, found.small, found.model, found.outside
    block, stored, blocks = found.told[-1], found.stored, found.blocks
    table_of = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    positions = next(
        (
            module.num_embeddings
            for name, module in table_of.items()
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


def _positioned(small: Small, found: _Found, rows: int | None) -> tuple[Axes, int]:
    """The axes, and how many rows there are beyond the positions that a config key says."""
    if rows is not None:
        for beyond in (0, 1, 2):
            axes = axes_of(small, found.told, found.kinds[-1].experts, rows - beyond)
            if "positions" in axes.of and axes.of["positions"]["size"].isidentifier():
                return axes, beyond
    return axes_of(small, found.told, found.kinds[-1].experts, None), 0


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


def _more(full: Mapping[str, Any], small: Small, made: Instance) -> Iterator[Check]:
    """Checks of calibration by blocks, and of the config: its shapes, what each size moves."""
    yield checked("blocks one at a time", lambda: _streamed(made))
    yield checked(
        "this config's names and shapes", lambda: _true_shapes(full, small, made.arch.table)
    )
    yield checked("each size varied", lambda: _varied(small, made.arch.table))


def _streamed(made: Instance) -> float:
    """The model run with one block in memory, as calibration does, computes the same logits."""
    ids = prompt(made.arch.sizes["vocab"])
    layerwise = LayerwiseModel(
        Checkpoint.open(made.path), made.arch, dtype=torch.float32, device="cpu"
    )
    with torch.no_grad(), quietly():
        layerwise.look_up(ids)
        states, calls = layerwise.enter(ids), layerwise.calls(ids)
        for layer in range(made.arch.layers):
            layerwise.load(layer, layerwise.read(made.arch.block(layer)))
            states = layerwise.run(layer, states, calls[layer])
            layerwise.free(layer)
        layerwise.load_head()
        whole = made.logits(ids)
        error = 0.0
        for window, start, got in layerwise.predictions(states):
            expected = whole[window, start : start + got.shape[-2]]
            error = max(error, float((got.reshape(expected.shape) - expected).abs().max()))
    if error > proof.WIDTH_ERROR:
        raise Disproved(f"the logits differ by {error:.1e} from those of the whole model")
    return error


def _true_shapes(full: Mapping[str, Any], small: Small, table: Table) -> str:
    if "expert" in table.axes:
        # Tens of thousands of tensors: its first blocks, one of each kind among them.
        full = of_depth(full, small.keys, small.config[small.keys["layers"]])
    model, arch = build(full, "meta"), Arch.from_config(full, table=table)
    names, state = Names(model), model.state_dict()
    there = proof.untied(arch, names, {name: tuple(one.shape) for name, one in state.items()})
    proof.compare(*proof.comparable(arch, names, there))
    some = f" in its first {arch.layers} blocks" if "expert" in table.axes else ""
    return f"{len(there)} tensors, {arch.parameters():,} parameters{some}"


def _varied(small: Small, table: Table) -> str:
    """One size key at a time: the table's shapes move as those of the model do."""
    model = build(small.config, "meta")
    names, known = Names(model), proof.of_one_block(model.state_dict())
    keys = [small.keys["layers"], *small.keys.standard.values(), *small.keys.others]
    moved = 0
    for key in dict.fromkeys(keys):
        value = small.config[key]
        for other in (37,) if value is None else (2 * value, value + 1):
            changed = dict(small.config) | {key: other}
            if key == small.keys["residual"]:
                changed |= dict.fromkeys(small.as_wide, other)
            if key == small.keys["layers"]:
                changed |= {one: [*small.config[one]] * 2 for one in small.keys.listed}
                if other != 2 * value:
                    continue
            try:
                there = shapes(changed)
            except Exception:  # a class refuses odd values in its own way
                continue
            if proof.of_one_block(there) != known:
                continue  # a model of other parts, of which this table says nothing
            arch = Arch.from_config(changed, table=table)
            meant, there = proof.comparable(arch, names, proof.untied(arch, names, there))
            for name in sorted(meant.keys() | there.keys()):
                if meant.get(name) != there.get(name):
                    raise Disproved(
                        f"with {key} {other}, {name} is {there.get(name)}, "
                        f"and by the table {meant.get(name)}"
                    )
            moved += 1
            break
    return f"{moved} keys"
