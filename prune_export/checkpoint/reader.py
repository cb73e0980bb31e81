"""Reads a model directory lazily: everything is checked, no weight is read until asked for.

Opening reads `config.json`, the index and the headers of the safetensors files, and nothing else;
it needs neither torch nor transformers. Shard files may be symbolic links (the Hub's cache is made
of them), but names in an index must stay inside the directory; the small files beside them must
be the model's own (`side`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.checkpoint.config import full_config, read_config
from prune_export.checkpoint.header import FLOATS, TORCH, Entry
from prune_export.checkpoint.side import refuse_adapter, side_files
from prune_export.checkpoint.stored import CONVERT, PICKLES, some, stored_entries
from prune_export.checkpoint.tied import refuse_two_heads, with_one_name, with_prefix
from prune_export.checkpoint.wrapped import Wrapped, part, unwrap
from prune_export.errors import CheckpointError, UnsupportedArch, did_you_mean
from prune_export.system.files import open_regular, shown

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Entry"]


@dataclass(frozen=True)
class Checkpoint:
    """A validated model directory.

    `config` is config.json as it stands; `entries` are the stored tensors by name, in the order in
    which they lie in the files; it is empty for a directory that was opened without weights.

    Of a larger model that holds a language model (of images and text) both are the language
    model's, under the names that it has by itself; `wrapped` is what surrounds it.
    """

    path: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    wrapped: Wrapped | None = None

    @staticmethod
    def open(path: Path | str, *, weights: bool = True) -> Checkpoint:
        """Opens a directory; with `weights=False` only its config.json.

        Raises:
            CheckpointError: the directory is broken, unsafe, incomplete, quantized or pickled.
        """
        path = Path(path)
        _refuse_files(path)
        config = read_config(path)
        refuse_adapter(path)
        side_files(path)  # what cannot be carried along is refused before any work
        config, wrapped = unwrap(config, path)
        if not weights:
            return Checkpoint(path, MappingProxyType(config), MappingProxyType({}), wrapped)
        entries = stored_entries(path)
        table = tables().get(str(config.get("model_type")))
        if table is not None and wrapped is not None:
            entries, wrapped = part(entries, table, wrapped, path)
        if table is not None:
            entries = with_one_name(with_prefix(entries, table), table, config, path)
        return Checkpoint(path, MappingProxyType(config), MappingProxyType(entries), wrapped)

    @property
    def nbytes(self) -> int:
        """The bytes of all stored tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtype(self) -> str:
        """The torch name, such as `bfloat16`, of the dtype that most of the bytes have."""
        count: Counter[str] = Counter()
        for entry in self.entries.values():
            count[entry.dtype] += entry.nbytes
        return TORCH[count.most_common(1)[0][0]] if count else str(self.full_config().get("dtype"))

    def full_config(self) -> dict[str, Any]:
        """config.json with transformers' defaults filled in; its own code is never run.

        Raises:
            UnsupportedArch: transformers does not know the model type.
            CheckpointError: transformers refuses the values.
        """
        return deepcopy(self._full)

    @cached_property
    def _full(self) -> dict[str, Any]:
        return full_config(self.config, self.path)

    def arch(self, ignore_keys: Collection[str] = ()) -> Arch:
        """The architecture, with the stored names and shapes checked against it.

        Raises:
            UnsupportedArch: no table describes this config.
            CheckpointError: a tensor is missing, unexpected, of another shape or not a float.
        """
        try:
            arch = Arch.from_config(self.full_config(), ignore_keys=ignore_keys)
        except UnsupportedArch as error:
            # The tables know no files; who reads the message has several models.
            if not error.where.startswith("config.json"):
                raise
            raise UnsupportedArch(f"{self.path}/{error.where}", error.problem, error.fix) from None
        if self.wrapped is not None:
            arch = replace(arch, within=self.wrapped.within)
        if self.entries:
            self.check(arch)
        return arch

    def check(self, arch: Arch) -> None:
        """Checks names, shapes and dtypes against an architecture.

        Raises:
            CheckpointError: a tensor is missing, unexpected, of another shape or not a float.
        """
        stored = {tensor.name: tensor for tensor in arch.stored()}
        missing = [name for name in stored if name not in self.entries]
        spare = set(self.redundant(arch))
        unexpected = [name for name in self.entries if name not in stored and name not in spare]
        if missing:
            raise CheckpointError(
                f"{self.path}  {missing[0]}",
                f"is missing ({len(missing)} of {len(stored)} tensors of this config are)"
                + (f"; unexpected: {some(unexpected)}" if unexpected else ""),
                "fetch the whole model; config.json and the weights must be of the same model",
            )
        if unexpected:
            raise CheckpointError(
                f"{self.path}  {unexpected[0]}",
                f"is not part of a {arch.family} model of this config "
                f"({len(unexpected)} unexpected: {some(unexpected)})",
                "config.json and the weights must be of the same model",
            )
        refuse_two_heads(self.entries, arch, self.path)
        for name, tensor in stored.items():
            entry = self.entries[name]
            if entry.shape != arch.shape(tensor):
                raise CheckpointError(
                    f"{self.path}  {name}",
                    f"got shape {list(entry.shape)}, expected {list(arch.shape(tensor))} "
                    f"({tensor.dims})",
                    "config.json and the weights must be of the same model",
                )
            if entry.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.path}  {name}",
                    f"got dtype {entry.dtype}, expected plain floats",
                    "the weights are quantized: start from the unquantized model",
                )

    def redundant(self, arch: Arch) -> tuple[str, ...]:
        """Stored names to leave behind: copies of tied tensors, old buffers, and `further`."""
        tied = {tensor.name for tensor in arch.tensors if tensor.tied_to is not None}
        stored = {tensor.name for tensor in arch.stored()}
        ends = tuple(f".{suffix}" for suffix in arch.table.ignored_tensors)
        return tuple(
            name
            for name in self.entries
            if name not in stored
            and (name in tied or name.endswith(ends) or name.startswith(arch.further))
        )

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor to the CPU, in memory of its own.

        Raises:
            CheckpointError: there is no such tensor, or the file has changed since it was opened.
        """
        entry = self._entry(name)
        return _read(entry, entry.shape, entry.start, name)

    def read_finite(self, name: str) -> torch.Tensor:
        """Reads a tensor to compute with, all values of which must be finite.

        Raises:
            CheckpointError: as `read`, or values are NaN or infinite.
        """
        import torch

        found = self.read(name)
        if not all_finite(found):
            raise CheckpointError(
                f"{self._entry(name).file}  {name}",
                f"{int((~torch.isfinite(found)).sum())} of {found.numel()} values are NaN or "
                "infinite",
                "this model is broken: download it again, or convert it to a wider dtype",
            )
        return found

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Reads rows `[start, stop)` of a tensor's first dimension, and no others.

        Raises:
            CheckpointError: there is no such tensor or no such row.
        """
        entry = self._entry(name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"{self.path}  {name}",
                f"got rows {start} to {stop}, but its shape is {list(entry.shape)}",
            )
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        return _read(entry, (stop - start, *entry.shape[1:]), entry.start + start * row, name)

    def side_files(self) -> tuple[Path, ...]:
        """Files to carry along, sorted: tokenizer, chat template, generation config, licence.

        The card and everything unknown stay behind: they describe, or belong to, another model.

        Raises:
            CheckpointError: one is a link out of the directory, no regular file, or far too long.
        """
        return side_files(self.path)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files, in the order in which `entries` visits them."""
        return tuple(dict.fromkeys(entry.file for entry in self.entries.values()))

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise CheckpointError(
                f"{self.path}  {name}", "is not a tensor here", did_you_mean(name, self.entries)
            )
        return self.entries[name]


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; 8-bit values are not looked at."""
    import torch

    if tensor.element_size() == 1:
        return True
    # What is not finite makes no finite sum, and a sum takes an eighteenth of the time.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def read_entry(entry: Entry, name: str) -> torch.Tensor:
    """Reads a whole tensor of a file whose header was read; a message calls it `name`."""
    return _read(entry, entry.shape, entry.start, name)


def _read(entry: Entry, shape: tuple[int, ...], start: int, name: str) -> torch.Tensor:
    import torch

    if entry.dtype not in TORCH:
        raise CheckpointError(
            f"{entry.file}  {name}",
            f"torch has no plain dtype for {entry.dtype}",
            "start from the unquantized model",
        )
    tensor = torch.empty(shape, dtype=getattr(torch, TORCH[entry.dtype]))
    view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    with open_regular(entry.file, None, "a safetensors file") as stream:
        stream.seek(start)
        while view:
            count = stream.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{entry.file}  {name}",
                    "ends before the tensor does: it has changed since it was opened",
                    "let nothing write to a model that is being read, then run again",
                )
            view = view[count:]
    return tensor


def _refuse_files(path: Path) -> None:
    """Says what to do when the path is not a directory."""
    # os.path's answer False where a name is too long or holds a null byte; a Path raises.
    if os.path.isdir(path):
        return
    if not os.path.exists(path):
        raise CheckpointError(shown(path), "does not exist", "give a model directory")
    if path.suffix == ".gguf":
        raise CheckpointError(
            str(path),
            "is a GGUF file, expected a model directory",
            "import it first: `prune_export.checkpoint.import_gguf(path, out)`",
        )
    if path.suffix in PICKLES:
        raise CheckpointError(str(path), "is not safetensors; pickles can run code", CONVERT)
    raise CheckpointError(
        str(path),
        "is a file, expected a model directory",
        "give the directory that holds config.json and the safetensors files",
    )
