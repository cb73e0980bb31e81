"""Derives a table from a config, and proves it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from prune_export.arch import Arch
from prune_export.arch.rare import Derivation
from prune_export.arch.table import Table
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel, ModuleNames
from prune_export.checkpoint import Checkpoint
from prune_export.deriving import proof
from prune_export.deriving.assembly import Found, table_of
from prune_export.deriving.instances import (
    Instance,
    build,
    prompt,
    quietly,
    random_instance,
    randomize,
)
from prune_export.deriving.kinds import BY_HAND, kinds_of, stored_names
from prune_export.deriving.parts import tell
from prune_export.deriving.proof import Check, Disproved, checked
from prune_export.deriving.small import Small, of_depth, shapes, shrunk
from prune_export.deriving.table import (
    head_sizes,
    look_outside,
)
from prune_export.deriving.watching import Watched
from prune_export.errors import PruneExportError, UnsupportedArch
from prune_export.system.temporary import Temporary

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


def derive(full: Mapping[str, Any]) -> Derived:
    """Derives and proves a table for the model type of a full config.

    `Derived.failed` says what is disproved: then the table is a start, not to be used.

    Raises:
        UnsupportedArch: no table can be made at all, and why.
    """
    began = time.perf_counter()
    refuse_unknown_type(full)
    threads = torch.get_num_threads()
    with Temporary() as folder:
        torch.set_num_threads(1)
        try:
            table, checks, notes = _derived(full, folder)
        except PruneExportError:
            raise
        except Exception as error:  # whatever the model's own code raises on its config
            raise UnsupportedArch(
                "config.json",
                f"no table can be derived: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}",
                BY_HAND,
            ) from error
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
            with Temporary() as folder:
                config = {**table.tiny.config, **changes, "model_type": model_type}
                try:
                    made = random_instance(config, folder / "small", table)
                except PruneExportError:
                    raise
                except Exception as error:
                    raise UnsupportedArch(
                        f"{table.family}  tiny.{name}",
                        f"transformers cannot make this model: {type(error).__name__}: {error}",
                        "correct `tiny` in the table",
                    ) from error
                checks = [*proof.prove(made, folder),
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
    torch.manual_seed(0)
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
    said, block = (
        table_of(Found(full, small, model, blocks, stored, kinds, told, outside)),
        told[-1],
    )
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
    names, state = ModuleNames(model), model.state_dict()
    there = proof.untied(arch, names, {name: tuple(one.shape) for name, one in state.items()})
    proof.compare(*proof.comparable(arch, names, there))
    some = f" in its first {arch.layers} blocks" if "expert" in table.axes else ""
    return f"{len(there)} tensors, {arch.parameters():,} parameters{some}"


def _varied(small: Small, table: Table) -> str:
    """One size key at a time: the table's shapes move as those of the model do."""
    model = build(small.config, "meta")
    names, known = ModuleNames(model), proof.of_one_block(model.state_dict())
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
