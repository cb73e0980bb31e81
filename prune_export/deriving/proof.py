"""Proves a table on a random model: what it says of tensors, cuts and configs is what happens.

Each check either holds, and says how near its two sides came, or is disproved. They are the same
for tables of ours (`tests/arch`), for `prune-export families prove`, and for derived tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from prune_export.arch import Arch
from prune_export.arch.roles import OUTPUT_PROJECTIONS
from prune_export.deriving.instances import (
    FILE,
    Instance,
    State,
    build,
    config_class,
    load,
    logits,
    prompt,
    quietly,
    write,
)
from prune_export.errors import PlanError

DEPTH_ERROR: Final = 1e-6
WIDTH_ERROR: Final = 2e-4
"""Largest differences of logits; a product over fewer channels is summed in another order."""
LEAST_CHANGE: Final = 1e-2
"""What is cut must have changed the logits by more, or nothing was shown."""
NEW_TOKENS: Final = 8


class Disproved(Exception):
    """A check of a table does not hold; the message says what was found."""


@dataclass(frozen=True)
class Check:
    """One check: what it shows, whether it holds, and what was measured or found.

    `refused` says that the table itself refuses it (its config cannot say such a cut), so that
    nothing is claimed that is not true.
    """

    what: str
    ok: bool
    found: str
    refused: bool = False

    @property
    def word(self) -> str:
        """What came of it."""
        return "holds" if self.ok else "refused" if self.refused else "disproved"


def shapes_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a directory's one safetensors file."""
    with safe_open(path / FILE, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def compare(meant: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a table's names and shapes with those that are there.

    Raises:
        Disproved: naming the first that differs.
    """
    for name in sorted(meant.keys() | there.keys()):
        if meant.get(name) != there.get(name):
            raise Disproved(
                f"{name} is {_shape(there.get(name))}, and by the table {_shape(meant.get(name))}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


def names_and_shapes(made: Instance) -> str:
    """The table's names and shapes are those on disk, and its parameters those of the model."""
    arch = made.arch
    there = shapes_on_disk(made.path)
    compare({tensor.name: arch.shape(tensor) for tensor in arch.stored()}, there)
    count = sum(parameter.numel() for parameter in made.model.parameters())
    if arch.parameters() != count:
        raise Disproved(f"{arch.parameters():,} parameters by the table, {count:,} in the model")
    if type(made.model).__name__ not in arch.table.architectures:
        raise Disproved(f"the class is {type(made.model).__name__}, not {arch.table.architectures}")
    return f"{len(there)} tensors"


def comparable(
    arch: Arch, names: Any, there: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """A table's shapes by names in memory, and those there; of fused tensors, numbers alone."""
    meant: dict[str, tuple[int, ...]] = {}
    fused: dict[str, int] = {}
    for tensor in arch.stored():
        name = names.renamed(tensor.name)
        if name in meant:
            fused.setdefault(name, prod(meant[name]))
            fused[name] += prod(arch.shape(tensor))
        else:
            meant[name] = arch.shape(tensor)
    found = {name: (prod(there[name]),) for name in fused if name in there}
    return meant | {name: (size,) for name, size in fused.items()}, {**there, **found}


def untied(arch: Arch, names: Any, there: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The shapes of a model in memory without those that are tied to others."""
    tied = {names.renamed(tensor.name) for tensor in arch.tensors if tensor.tied_to is not None}
    return {name: shape for name, shape in there.items() if name not in tied}


def of_one_block(names: Collection[str]) -> frozenset[str]:
    """Names without the numbers of blocks."""
    return frozenset(re.sub(r"\.[0-9]+\.", ".*.", name) for name in names)


def module_paths(made: Instance) -> str:
    """Blocks, final norm and embeddings are where the table says; its norm is of that kind."""
    table = made.arch.table
    if len(made.model.get_submodule(table.blocks)) != made.arch.layers:
        raise Disproved(f"{table.blocks} has {len(made.model.get_submodule(table.blocks))} blocks")
    for path in (*table.embeddings, *filter(None, [table.final_norm])):
        parent, _, name = path.rpartition(".")
        if not hasattr(made.model.get_submodule(parent), name):
            raise Disproved(f"{path} is no module of the model")
    if made.arch.final_norm:
        norm = made.model.get_submodule(made.arch.final_norm)
        states = torch.randn(3, made.arch.sizes["residual"])
        with torch.no_grad():
            moved = bool((norm(states + 5) - norm(states)).abs().max() > 1e-3)
        if moved is not (table.norm == "rms"):
            raise Disproved(f"the norm is not of the kind `{table.norm}`")
    return table.blocks


@contextmanager
def skipped(made: Instance, layers: Collection[int]) -> Iterator[None]:
    """Makes the blocks return their input; nothing else of the model or its config changes."""

    def unchanged(_module: object, inputs: Any, named: Any, output: Any) -> Any:
        states = inputs[0] if inputs else named["hidden_states"]
        if isinstance(output, tuple | list):
            return type(output)((states, *output[1:]))
        return states

    blocks = made.model.get_submodule(made.arch.table.blocks)
    hooks = [blocks[i].register_forward_hook(unchanged, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def cut_depth(made: Instance, layers: Collection[int], base: Mapping[str, Any], out: Path) -> Any:
    """Cuts files by what the table says and loads the result as a stranger would."""
    arch, source = made.arch.without(layers), made.state()
    names = made.arch.origin(made.arch.kept(layers))
    write({new: source[old] for new, old in names.items()}, arch.to_config(base), out)
    compare({tensor.name: arch.shape(tensor) for tensor in arch.stored()}, shapes_on_disk(out))
    model, wrong = load(out)
    if wrong:
        raise Disproved(f"the cut model does not load: {'; '.join(wrong)}")
    if type(model) is not type(made.model):
        raise Disproved(f"the cut model loads as {type(model).__name__}")
    return model


def drops(layers: int) -> tuple[tuple[int, ...], ...]:
    """Which blocks are dropped to prove depth cuts: one, every other one, and all but one."""
    every_other = tuple(range(0, layers - 1, 2))
    alone = tuple(layer for layer in range(layers) if layer != min(2, layers - 1))
    return tuple(dict.fromkeys((((1,) if layers > 1 else ()), every_other, alone)))


def depth(made: Instance, layers: Collection[int], out: Path) -> float:
    """A model without some blocks computes as the whole one that skips them; the largest error."""
    ids = prompt(made.arch.sizes["vocab"])
    whole = made.logits(ids)
    smaller = cut_depth(made, layers, made.full, out)
    with skipped(made, layers):
        expected = made.logits(ids)
    return _same(logits(smaller, ids), expected, whole, DEPTH_ERROR)


def _same(
    got: torch.Tensor, expected: torch.Tensor, whole: torch.Tensor, most: float, relative: float = 0
) -> float:
    if not bool(torch.isfinite(whole).all()):
        raise Disproved("a random model's logits are not finite")
    change = float((expected - whole).abs().max())
    if change <= LEAST_CHANGE:
        raise Disproved(f"what was cut changes the logits by {change:.1e} only: nothing is shown")
    error = (got - expected).abs()
    if bool((error > most + relative * expected.abs()).any()):
        raise Disproved(f"the logits differ by {float(error.max()):.1e}, allowed {most:g}")
    return float(error.max())


def generation(made: Instance, layers: Collection[int], out: Path) -> str:
    """A cut model generates the same tokens with and without its cache."""
    ids = prompt(made.arch.sizes["vocab"])
    smaller = cut_depth(made, layers, made.full, out)
    asked = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": 0,
    }
    with quietly():
        cached = smaller.generate(ids, use_cache=True, **asked)
        plain = smaller.generate(ids, use_cache=False, **asked)
    if not torch.equal(cached, plain):
        raise Disproved("generated tokens differ with and without the cache")
    return f"{NEW_TOKENS} tokens"


def unchanged_config(made: Instance) -> str:
    """Where nothing is cut, nothing is written into the config."""
    if made.arch.to_config(made.full) != made.full:
        raise Disproved("the config is rewritten although nothing was cut")
    if made.arch.without(()).to_config(made.full) != made.full:
        raise Disproved("the config is rewritten although no block was dropped")
    return f"{len(made.full)} keys"


def keep_of(arch: Arch, counts: Mapping[str, int]) -> dict[str, list[int]]:
    """A different choice of so many places for every axis of a name (`mlp.3`, `kv.0` …)."""
    generator = torch.Generator().manual_seed(1)
    return {
        axis: sorted(torch.randperm(size, generator=generator)[: counts[name]].tolist())
        for axis, size in arch.sizes.items()
        if (name := axis.partition(".")[0]) in counts
    }


def cut_width(arch: Arch, state: State, kept: Mapping[str, Sequence[int]]) -> tuple[Arch, State]:
    """What surgery does, in five lines: every tensor that uses an axis keeps its positions."""
    state = dict(state)
    for axis, index in kept.items():
        for tensor in arch.using(axis):
            if tensor.tied_to is None:
                for dimension, positions in tensor.dims.kept(axis, index, arch.sizes):
                    state[tensor.name] = state[tensor.name].index_select(
                        dimension, torch.tensor(positions)
                    )
        arch = arch.resized(axis, len(index))
    return arch, state


def silenced(arch: Arch, state: State, kept: Mapping[str, Sequence[int]]) -> State:
    """The whole model's tensors with zeros where projections back read places that are not kept."""
    state = dict(state)
    for axis, index in kept.items():
        lost = sorted(set(range(arch.sizes[axis])) - set(index))
        for tensor in arch.using(axis):
            if tensor.role not in OUTPUT_PROJECTIONS:
                continue
            for dimension, positions in tensor.dims.kept(axis, lost, arch.sizes):
                state[tensor.name] = state[tensor.name].index_fill(
                    dimension, torch.tensor(positions), 0.0
                )
    return state


def width(made: Instance, counts: Mapping[str, int], out: Path) -> float:
    """Cut to so many places of axes, a model computes as the whole with the rest silenced."""
    ids = prompt(made.arch.sizes["vocab"])
    kept, state = keep_of(made.arch, counts), made.state()
    if not kept:
        raise Disproved(f"the model has no axis {' or '.join(counts)}")
    arch, narrow = cut_width(made.arch, state, kept)
    smaller, wrong = load(write(narrow, arch.to_config(made.full), out / "narrow"))
    if wrong:
        raise Disproved(f"the narrower model does not load: {'; '.join(wrong)}")
    silent = write(silenced(made.arch, state, kept), made.full, out / "silent")
    expected = logits(load(silent)[0], ids)
    return _same(logits(smaller, ids), expected, made.logits(ids), WIDTH_ERROR, 1e-4)


def rebuilt(made: Instance, counts: Mapping[str, int]) -> str:
    """A config that says a width cut makes transformers build a model of just these shapes."""
    sizes = {axis: len(kept) for axis, kept in keep_of(made.arch, counts).items()}
    arch = made.arch.with_sizes(sizes)
    config = arch.to_config(made.full)
    with quietly():
        full = config_class(str(config["model_type"])).from_dict(config).to_dict()
    if Arch.from_config(full, table=made.arch.table).sizes != arch.sizes:
        raise Disproved("the config that was written says other sizes")
    model = build(full, "meta")
    there = sum(parameter.numel() for parameter in model.parameters())
    if arch.parameters() != there:
        raise Disproved(f"{arch.parameters():,} parameters are meant, {there:,} are built")
    return f"{there:,} parameters"


def checked(what: str, check: Callable[[], str | float]) -> Check:
    """Runs one check; whatever a model's code raises disproves it too."""
    try:
        found = check()
    except Disproved as error:
        return Check(what, False, str(error))
    except PlanError as error:
        return Check(what, False, f"{error.where} {error.problem}", refused=True)
    except Exception as error:  # the model's own code, on what it was not made for
        lines = str(error).strip().splitlines() or [""]
        return Check(what, False, f"{type(error).__name__}: {lines[0]}".rstrip(": ")[:300])
    return Check(what, True, found if isinstance(found, str) else f"largest error {found:.1e}")


DEPTH: Final = "depth"
"""The checks without which nothing is done with a model."""
WIDTHS: Final = {"mlp": "MLP width", "moe": "experts' width", "shared": "shared expert's width",
                 "kv": "heads"}  # fmt: skip
"""Axes that methods cut, and what that is called."""


def prove(made: Instance, scratch: Path) -> list[Check]:
    """Every check that a table must pass, and those of width that its config can say."""
    found = [
        checked("names and shapes", lambda: names_and_shapes(made)),
        checked("module paths", lambda: module_paths(made)),
        checked("unchanged config", lambda: unchanged_config(made)),
    ]
    lost = drops(made.arch.layers)
    found += [
        checked(
            "depth cut = blocks bypassed",
            lambda: max(depth(made, one, scratch / f"d{n}") for n, one in enumerate(lost) if one),
        ),
        checked("cache", lambda: generation(made, lost[1], scratch / "cache")),
    ]
    axes = dict.fromkeys(axis.partition(".")[0] for axis in made.arch.sizes)
    for name, what in WIDTHS.items():
        if name in axes:
            found.append(checked(what, partial(_width, made, name, scratch)))
    return found


def _width(made: Instance, name: str, scratch: Path) -> float:
    size = min(s for axis, s in made.arch.sizes.items() if axis.partition(".")[0] == name)
    # Kernels of mixtures ask for multiples of four.
    count = max(1, size // 2) if name == "kv" else max(1, size * 5 // 32 * 4)
    if count >= size:
        raise Disproved(f"there is only {size} of it")
    counts = {name: count} | _with_it(made.arch, name, count, size)
    rebuilt(made, counts)
    return width(made, counts, scratch / name)


def _with_it(arch: Arch, name: str, count: int, size: int) -> dict[str, int]:
    """Shared experts that are so many times as wide as the others are cut with them."""
    shared = arch.table.axes.get("shared")
    if name != "moe" or shared is None or arch.table.axes["moe"].size not in shared.size.split():
        return {}
    wide = next((own for axis, own in arch.sizes.items() if axis.startswith("shared.")), 0)
    return {"shared": wide // size * count} if wide else {}
