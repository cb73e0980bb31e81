"""Writes a model directory: headers first, then the bytes in order, the index last.

Shapes are known before any content is, so the shards are laid out and their headers written at
once; after that a tensor's life is one append. What is untouched is never read into this process:
the kernel copies its bytes from file to file, neighbours in one call. Neither torch nor
transformers is imported for that.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from prune_export.checkpoint.header import BITS, TORCH, Entry, nbytes
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.stored import INDEX, SINGLE
from prune_export.errors import CheckpointError, PlanError
from prune_export.progress import Progress, Silent, Task
from prune_export.system.files import open_regular
from prune_export.system.platforms import open_flags, read_at
from prune_export.units import text_from_bytes

if TYPE_CHECKING:
    import torch

SHARD_BYTES: Final = 5_000_000_000
"""transformers' own default for a shard."""

_COPY_BYTES: Final = 64 * 2**20
_BUFFER_BYTES: Final = 4 * 2**20
_SPARE_BYTES: Final = 16 * 2**20
_PAGE_BYTES: Final = 4096
_NOT_HERE: Final = frozenset({
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY,
    errno.ENOTSOCK,
})  # fmt: skip
"""What a kernel or a file system answers that cannot copy between these two files."""


@dataclass(frozen=True)
class Planned:
    """A tensor to be written, whose shape is known before its content.

    `dtype` is the format's name, such as `BF16`. `content` is where the bytes lie already, or
    something to call when it is this tensor's turn: it returns the tensor, or pieces of it in
    order, so that no more than a piece need be in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    content: Entry | Callable[[], torch.Tensor | Iterator[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """The tensor's bytes."""
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Shard:
    """One file to be written: its name, its header, and its tensors in the order of their bytes."""

    file: str
    header: bytes
    tensors: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        """The file's bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def lay_out(tensors: Iterable[Planned], max_shard_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Distributes `tensors` over shards, in the order given, each up to `max_shard_bytes`.

    A tensor that is larger than that gets a file of its own. Inside a file wider dtypes come first,
    as the reference implementation has it, so that every tensor is aligned to its own elements.

    Raises:
        PlanError: there is nothing to write, a name comes twice, or the limit is not positive.
    """
    groups: list[list[Planned]] = []
    room = 0
    seen: set[str] = set()
    if max_shard_bytes < 1:
        raise PlanError("max_shard_bytes", f"got {max_shard_bytes}, expected at least 1")
    for tensor in tensors:
        if tensor.name in seen or tensor.name == "__metadata__":
            raise PlanError(tensor.name, "cannot be written: the name is taken")
        if not tensor.name.isprintable():
            raise PlanError(ascii(tensor.name), "cannot be written: the name cannot be printed")
        seen.add(tensor.name)
        if not groups or tensor.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if not groups:
        raise PlanError("checkpoint", "got no tensors, expected at least one")
    count = len(groups)
    return tuple(
        _shard(SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    )


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    tensors: Iterable[Planned],
    *,
    side_files: Sequence[Path] = (),
    max_shard_bytes: int = SHARD_BYTES,
    fsync: bool = True,
    progress: Progress | None = None,
) -> Checkpoint:
    """Writes a model directory that safetensors and transformers load, and opens it.

    The same arguments give the same bytes. The files appear under their names only when all are
    complete; config.json and the index come last. Weight files that an earlier, broken attempt
    left in `out` are replaced. `fsync=False` leaves it to the caller, or to the kernel, when the
    bytes reach the disk.

    Raises:
        PlanError: the disk is too small, or the tensors cannot be laid out.
        CheckpointError: a content is not what was planned, or a source file has changed.
    """
    shards = lay_out(tensors, max_shard_bytes)
    _refuse_own_source(out, shards)
    _refuse_full_disk(out, sum(shard.nbytes for shard in shards), side_files)
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("model*.safetensors"), *out.glob(INDEX), *out.glob(".*.partial")):
        stale.unlink()
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    with _together(fsync=fsync) as files:
        with (progress or Silent()).task("writing weights", total) as task:
            for shard in shards:
                with _file(out / shard.file, files) as target:
                    _write(target, shard.header)
                    _append(target, shard.tensors, task)
        for side in side_files:
            with _file(out / side.name, files) as target, open_regular(side) as source:
                _copy(source.fileno(), target, 0, side.stat().st_size, side)
        jsons = {"config.json": config} | ({INDEX: _index(shards, total)} if shards[1:] else {})
        for name, value in jsons.items():
            with _file(out / name, files) as target:
                text = json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n"
                _write(target, text.encode())
    return Checkpoint.open(out)


def _shard(file: str, tensors: Sequence[Planned]) -> Shard:
    ordered = tuple(sorted(tensors, key=lambda tensor: -BITS[tensor.dtype]))
    rows: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        stop = at + tensor.nbytes
        rows[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode()
    step, phase = _phase(ordered)
    text += b" " * ((phase - 8 - len(text)) % step)
    return Shard(file, struct.pack("<Q", len(text)) + text, ordered)


def _phase(tensors: Sequence[Planned]) -> tuple[int, int]:
    """Chooses where the data begin: at a multiple of the first number plus the second.

    The format asks for multiples of 8. The kernel copies a fifth faster between files when both
    offsets lie at the same place in their pages, so the header is padded to where most of the
    copied bytes come to lie as they did in their source.
    """
    count: Counter[int] = Counter()
    at = 0
    for tensor in tensors:
        if isinstance(tensor.content, Entry):
            count[(tensor.content.start - at) % _PAGE_BYTES] += tensor.nbytes
        at += tensor.nbytes
    best = max(sorted(count), key=count.__getitem__, default=0)
    return (_PAGE_BYTES, best) if count and best % 8 == 0 else (8, 0)


def _index(shards: Sequence[Shard], total: int) -> dict[str, Any]:
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    parameters = sum(prod(tensor.shape) for shard in shards for tensor in shard.tensors)
    return {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _refuse_own_source(out: Path, shards: Sequence[Shard]) -> None:
    sources = {
        tensor.content.file.parent
        for shard in shards
        for tensor in shard.tensors
        if isinstance(tensor.content, Entry)
    }
    if out.exists() and any(out.samefile(source) for source in sources):
        raise PlanError(
            str(out), "is the directory that is read from", "write to another directory"
        )


def _refuse_full_disk(out: Path, weights: int, side_files: Sequence[Path]) -> None:
    place = out.resolve()
    while not place.exists():
        place = place.parent
    needed = weights + sum(file.stat().st_size for file in side_files) + _SPARE_BYTES
    replaced = sum(file.stat().st_size for file in place.glob("model*.safetensors*"))
    free = shutil.disk_usage(place).free + (replaced if place == out.resolve() else 0)
    if needed > free:
        raise PlanError(
            str(out),
            f"needs {text_from_bytes(needed)} of disk, {text_from_bytes(free)} are free",
            "free some space, or choose another disk for the output",
        )


@contextmanager
def _together(*, fsync: bool) -> Iterator[list[Path]]:
    """Makes files appear under their names together, in order, when the last is complete.

    They are forced to the disk at the end, not one by one: the kernel writes the first while this
    process still copies the last.
    """
    files: list[Path] = []
    try:
        yield files
        for file in files if fsync else ():
            descriptor = os.open(_partial(file), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for file in files:
            _partial(file).replace(file)
    except BaseException as error:
        for file in files:
            with suppress(OSError):
                _partial(file).unlink()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            error.filename or str(files[-1]),
            f"cannot be written: {error.strerror}",
            "free some space, or choose another disk for the output"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "see that the directory can be written, then run again",
        ) from error


@contextmanager
def _file(file: Path, files: list[Path]) -> Iterator[int]:
    """Opens a file for appending that does not have its name yet."""
    target = os.open(_partial(file), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | open_flags(), 0o666)
    files.append(file)
    try:
        yield target
    finally:
        os.close(target)


def _partial(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial")


def _append(target: int, tensors: Sequence[Planned], task: Task) -> None:
    for copied, run in groupby(tensors, key=lambda tensor: isinstance(tensor.content, Entry)):
        if copied:
            for file, start, stop in _ranges(
                tensor.content for tensor in run if isinstance(tensor.content, Entry)
            ):
                with file.open("rb", buffering=0) as source:
                    _copy(source.fileno(), target, start, stop - start, file, task)
        else:
            for tensor in run:
                _write_content(target, tensor, task)


def _ranges(entries: Iterable[Entry]) -> Iterator[tuple[Path, int, int]]:
    """Lists the byte ranges of the entries in order, neighbours joined into one."""
    file, start, stop = None, 0, 0
    for entry in entries:
        if entry.file != file or entry.start != stop:
            if file is not None:
                yield file, start, stop
            file, start = entry.file, entry.start
        stop = entry.stop
    if file is not None:
        yield file, start, stop


def _copy(
    source: int, target: int, start: int, count: int, file: Path, task: Task | None = None
) -> None:
    """Appends `count` bytes of `source` from `start`; in the kernel where it can."""
    copiers = [_copy_range, _send, _read_and_write]
    while count:
        try:
            done = copiers[0](source, target, start, min(count, _COPY_BYTES))
        except OSError as error:
            if error.errno not in _NOT_HERE or len(copiers) == 1:
                raise
            done = 0
        if not done:
            # Some file systems answer 0 to what they cannot do: only a read knows the file's end.
            copiers.pop(0)
            if not copiers:
                raise CheckpointError(
                    str(file),
                    "ends before its tensors do: it has changed since it was opened",
                    "let nothing write to a model that is being read, then run again",
                )
            continue
        start += done
        count -= done
        if task is not None:
            task.advance(done)


def _copy_range(source: int, target: int, start: int, count: int) -> int:
    if not hasattr(os, "copy_file_range"):  # Linux only.
        return 0
    return os.copy_file_range(source, target, count, offset_src=start)


def _send(source: int, target: int, start: int, count: int) -> int:
    if not hasattr(os, "sendfile"):
        return 0
    return os.sendfile(target, source, start, count)


def _read_and_write(source: int, target: int, start: int, count: int) -> int:
    piece = memoryview(bytearray(min(count, _BUFFER_BYTES)))
    done = read_at(source, piece, start)
    _write(target, piece[:done])
    return done


def _write(target: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(target, left) :]


def _write_content(target: int, tensor: Planned, task: Task) -> None:
    import torch

    assert not isinstance(tensor.content, Entry)
    found = tensor.content()
    pieces = iter([found]) if isinstance(found, torch.Tensor) else found
    if isinstance(found, torch.Tensor) and tuple(found.shape) != tensor.shape:
        raise _unplanned(tensor, f"shape {list(found.shape)}")
    del found
    wanted, written = getattr(torch, TORCH[tensor.dtype]), 0
    for piece in pieces:
        if piece.dtype != wanted:
            raise _unplanned(tensor, f"dtype {str(piece.dtype).removeprefix('torch.')}")
        written += piece.numel()
        if written > prod(tensor.shape):
            break
        flat = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _write(target, flat.numpy().data)
        task.advance(flat.numel())
    if written != prod(tensor.shape):
        raise _unplanned(tensor, f"{written} elements")


def _unplanned(tensor: Planned, got: str) -> CheckpointError:
    return CheckpointError(
        tensor.name,
        f"got {got}, planned were {TORCH[tensor.dtype]} {list(tensor.shape)}",
        "what computes this tensor must keep the dtype and the shape that were announced",
    )
