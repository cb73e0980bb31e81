"""Applies edits to a checkpoint: the only code that changes weights.

A method yields edits, all of which speak of the model as it was: names, layers and positions before
any cut, and whole tensors of the old shape where it overwrites. `rewrite` turns them into a new
checkpoint. Every new shape follows from the architecture's table, so the files are laid out before
a weight is read; what no edit touches is copied byte for byte without passing through this process;
what is cut passes through in windows of rows. A cut is made on the bits, so every dtype stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prune_export.arch import Arch, Tensor
from prune_export.checkpoint.config import full_config
from prune_export.checkpoint.grid_file import NAME as GRIDS
from prune_export.checkpoint.header import TORCH, Entry
from prune_export.checkpoint.reader import Checkpoint, all_finite
from prune_export.checkpoint.tied import refuse_two_heads
from prune_export.checkpoint.wrapped import Wrapped
from prune_export.checkpoint.writer import SHARD_BYTES, Planned, write_checkpoint
from prune_export.errors import CheckpointError, PlanError
from prune_export.modeling import FOLDER
from prune_export.progress import Progress
from prune_export.surgery.edits import Edit, Edits
from prune_export.system.files import is_regular
from prune_export.units import MIB

if TYPE_CHECKING:
    import torch

Cuts = tuple[tuple[int, list[int]], ...]
"""(dimension, ascending positions to keep in it), each dimension once."""

_DEAD_KEYS: Final = ("auto_map", "_name_or_path", "_model_name_or_path")
"""Config keys that would point at code or places that the new checkpoint does not come with."""

_WINDOW_BYTES: Final = 64 * MIB
"""Rows read at a time; more is no faster."""


def rewrite(
    source: Checkpoint,
    arch: Arch,
    edits: Iterable[Edit],
    out: Path,
    *,
    ram_bytes: int,
    max_shard_bytes: int = SHARD_BYTES,
    fsync: bool = True,
    progress: Progress | None = None,
) -> Checkpoint:
    """Applies `edits` to `source`, whose architecture is `arch`, and writes the result to `out`.

    `ram_bytes` is the process's budget; a fraction of it bounds the rows that are read at a time,
    while a value that `Overwrite` brings is whole. Tokenizer, templates, generation config and
    licence come along. The same arguments give the same bytes.

    Raises:
        PlanError: an edit is impossible, or the disk is too small; nothing has been written.
        CheckpointError: the source is not what `arch` says, has changed while it was read, or the
            result is not what was predicted.
    """
    sorted_edits = Edits.of(edits, arch)
    after = sorted_edits.after(arch)
    config = after.to_config(source.config)
    for key in _DEAD_KEYS:
        config.pop(key, None)
    if arch.further and any(name.startswith(arch.further) for name in source.entries):
        config |= dict.fromkeys(arch.table.further_keys() & config.keys(), 0)  # left behind
    side_files = source.side_files()
    if after.table.bundled:
        config["auto_map"] = after.table.bundled.auto_map()
        side_files = (*side_files, *(FOLDER / name for name in after.table.bundled.files))
    source.check(arch)
    _refuse_unsayable(config, after, out)
    refuse_two_heads(source.entries, arch, source.path)
    window = max(MIB, min(_WINDOW_BYTES, ram_bytes // 16))
    planned = list(_planned(source, arch, after, sorted_edits, window))
    if source.wrapped is not None:
        config = source.wrapped.whole_config(source.config, config)
        planned = _whole(source.wrapped, planned)
    result = write_checkpoint(
        out,
        config,
        planned,
        side_files=side_files,
        max_shard_bytes=max_shard_bytes,
        fsync=fsync,
        progress=progress,
    )
    result.check(after)
    return result


def write_text_alone(source: Checkpoint, out: Path, progress: Progress | None = None) -> Checkpoint:
    """Writes the language model of a larger model (of images and text) as a plain checkpoint.

    Its bytes are the same; only names and config.json are those of a causal language model. The
    grids of quantized weights, which are kept under these names, come along.
    """
    planned = [Planned(name, one.dtype, one.shape, one) for name, one in source.entries.items()]
    config = {key: one for key, one in source.config.items() if key not in _DEAD_KEYS}
    side_files = [file for file in source.side_files() if "processor" not in file.name]
    side_files += [file for file in (source.path / GRIDS,) if is_regular(file)]
    return write_checkpoint(out, config, planned, side_files=side_files, progress=progress)


def _planned(
    source: Checkpoint, arch: Arch, after: Arch, edits: Edits, window: int
) -> Iterator[Planned]:
    """Plans the tensors to write, in the order of the source, to copy its bytes in runs."""
    names = _new_names(arch, after, edits)
    for old, entry in source.entries.items():
        if old not in names:
            continue
        content = _content(source, old, arch.by_name[old], arch, edits, window)
        yield Planned(names[old], entry.dtype, after.shape(after.by_name[names[old]]), content)
    whole = edits.whole(arch)
    fresh = whole.origin(whole.kept(edits.drop))
    for new, old in fresh.items():
        if old not in arch.by_name:
            cuts = _cuts(whole.by_name[old], whole, edits.keep)
            shape = whole.shape(whole.by_name[old])
            dtype = next(iter(source.entries.values())).dtype
            value = _Overwritten(old, dtype, shape, edits.overwrite[old], cuts)
            yield Planned(new, dtype, after.shape(after.by_name[new]), value)
    for name in edits.untie:
        tensor = arch.by_name[name]
        stored = str(tensor.tied_to)
        content = _content(source, stored, tensor, arch, edits, window)
        yield Planned(name, source.entries[stored].dtype, after.shape(after.by_name[name]), content)


def _whole(wrapped: Wrapped, planned: Iterable[Planned]) -> list[Planned]:
    """The tensors of a larger model, given those of its language model; the others as they are."""
    own = [replace(one, name=wrapped.stored_name(one.name)) for one in planned]
    rest = wrapped.carried.items()
    return own + [Planned(name, entry.dtype, entry.shape, entry) for name, entry in rest]


def _content(
    source: Checkpoint, stored: str, tensor: Tensor, arch: Arch, edits: Edits, window: int
) -> Entry | Callable[[], torch.Tensor | Iterator[torch.Tensor]]:
    """The content to write for a tensor that is stored under the name `stored`."""
    entry, cuts = source.entries[stored], _cuts(tensor, arch, edits.keep)
    if tensor.name in edits.overwrite:
        value = edits.overwrite[tensor.name]
        return _Overwritten(tensor.name, entry.dtype, entry.shape, value, cuts)
    return _Cut(source, stored, cuts, window) if cuts else entry


def _new_names(arch: Arch, after: Arch, edits: Edits) -> dict[str, str]:
    """Renames each stored tensor that is left; blocks and experts are renumbered."""
    kept = arch.kept(edits.drop)
    names = {old: new for new, old in arch.origin(kept).items()}
    for axis, experts in edits.keep.items():
        if not axis.startswith("expert."):
            continue
        layer = int(axis.split(".")[1])
        block = after.block(kept.index(layer))
        new = {(tensor.role, tensor.expert): tensor.name for tensor in block}
        for tensor in arch.block(layer):
            if tensor.expert in experts:
                names[tensor.name] = new[tensor.role, experts.index(tensor.expert)]
            elif tensor.expert is not None:
                del names[tensor.name]
    return names


def _cuts(tensor: Tensor, arch: Arch, keep: Mapping[str, tuple[int, ...]]) -> Cuts:
    """The positions of a tensor's dimensions that survive all of `keep`."""
    sizes = dict(arch.sizes)
    left: dict[int, list[int]] = {}
    for axis in sorted(tensor.dims.axes() & keep.keys()):
        for dim, positions in tensor.dims.kept(axis, keep[axis], sizes):
            before = left.get(dim)
            left[dim] = positions if before is None else [before[at] for at in positions]
        sizes[axis] = len(keep[axis])
    return tuple(sorted(left.items()))


@dataclass(frozen=True)
class _Cut:
    """Cuts a stored tensor, read in windows of at most `window` bytes."""

    source: Checkpoint
    name: str
    cuts: Cuts
    window: int

    def __call__(self) -> Iterator[torch.Tensor]:
        entry = self.source.entries[self.name]
        of = dict(self.cuts)
        rows = of.pop(0, None) or range(entry.shape[0])
        row_bytes = max(1, entry.nbytes // entry.shape[0])
        for part in _windows(rows, max(1, self.window // row_bytes)):
            first, last = part[0], part[-1]
            piece = self.source.read_rows(self.name, first, last + 1)
            inside = [(0, [row - first for row in part]), *of.items()]
            yield _cut(piece, tuple(inside))


@dataclass(frozen=True)
class _Overwritten:
    """Cuts a new value, whose shape and dtype must be the old ones."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    value: Callable[[], torch.Tensor]
    cuts: Cuts

    def __call__(self) -> torch.Tensor:
        import torch

        found = self.value()
        dtype = getattr(torch, TORCH[self.dtype])
        if tuple(found.shape) != self.shape or found.dtype != dtype:
            raise CheckpointError(
                self.name,
                f"is overwritten with {_text(found.dtype)} {list(found.shape)}, "
                f"expected {_text(dtype)} {list(self.shape)}",
                "an Overwrite keeps the dtype and the shape that the tensor had before any cut",
            )
        if not all_finite(found):
            raise CheckpointError(
                self.name,
                f"is overwritten with {int((~torch.isfinite(found)).sum())} values that are not "
                "finite",
                "use a wider dtype, or stronger damping, in the method that computes it",
            )
        return _cut(found.detach().cpu(), self.cuts)


def _cut(tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Keeps positions of a tensor; on the bits, because not every dtype can be indexed."""
    import torch

    if not cuts:
        return tensor
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    left = tensor.contiguous().view(bits)
    for dim, positions in cuts:
        if len(positions) != left.shape[dim]:
            left = left.index_select(dim, torch.tensor(positions))
    return left.view(tensor.dtype)


def _windows(rows: Iterable[int], span: int) -> Iterator[list[int]]:
    """Groups ascending rows so that each group spans less than `span` rows."""
    group: list[int] = []
    for row in rows:
        if group and row - group[0] >= span:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _refuse_unsayable(config: Mapping[str, Any], after: Arch, out: Path) -> None:
    """Refuses a new config that transformers would not read as exactly what was planned."""
    try:
        full = full_config(config, out)
    except CheckpointError as error:
        raise PlanError(
            str(out),
            f"would be a model that transformers refuses ({error.problem})",
            "choose another size for what is cut",
        ) from error
    # The keys of the source's config were accepted, or answered for, before.
    meant = Arch.from_config(full, ignore_keys=after.config.keys())
    if meant.sizes != after.sizes or meant.tensors != after.tensors:
        wrong = sorted(
            axis
            for axis in {*meant.sizes, *after.sizes}
            if meant.sizes.get(axis) != after.sizes.get(axis)
        )
        raise PlanError(
            f"{out}/config.json",
            "could not say what is cut"
            + "".join(
                f": {axis} would read back as {meant.sizes.get(axis)}, "
                f"planned is {after.sizes.get(axis)}"
                for axis in wrong[:1]
            ),
            f"the {after.family} table is wrong: report it with this message",
        )


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
