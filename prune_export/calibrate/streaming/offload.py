"""Offloads large arrays to plain files where they do not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import torch

from prune_export.system.platforms import open_flags, read_at, write_at


class Buffer:
    """An array `[rows, *shape]`, read and written by rows.

    In memory, or, with `path`, in a file that is read and written with plain system calls: mapped
    pages would count as this process's memory.
    """

    def __init__(
        self,
        rows: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        path: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.rows = rows
        self.shape = shape
        self.dtype = dtype
        self.path = path
        self.device = device
        self._row_bytes = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self._memory = None if path else torch.zeros(rows, *shape, dtype=dtype, device=device)
        self._file = -1
        if path:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | open_flags(), 0o644)
            os.ftruncate(self._file, rows * self._row_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return self.rows * self._row_bytes

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows `[start, stop)`; a view of memory, or a tensor of its own where there is a file."""
        if self._memory is not None:
            return self._memory[start:stop]
        found = torch.empty(stop - start, *self.shape, dtype=self.dtype)
        self._fill(found, start)
        return found

    def prefixes(self, start: int, stop: int, length: int) -> torch.Tensor:
        """Reads the first `length` entries of rows `[start, stop)`, or all if they are fewer."""
        if self._memory is not None:
            return self._memory[start:stop, :length]
        length = min(length, self.shape[0])
        found = torch.empty(stop - start, length, *self.shape[1:], dtype=self.dtype)
        for row, own in enumerate(found, start):
            self._fill(own, row)
        return found

    def _fill(self, tensor: torch.Tensor, row: int) -> None:
        """Fills a tensor from the file, from a row on."""
        view, offset = _bytes(tensor), row * self._row_bytes
        while view:
            count = read_at(self._file, view, offset)
            view, offset = view[count:], offset + count

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Writes `rows` from row `start` on."""
        if self._memory is not None:
            self._memory[start : start + len(rows)].copy_(rows)
            return
        view, offset = _bytes(rows.to("cpu", self.dtype).contiguous()), start * self._row_bytes
        while view:
            count = write_at(self._file, view, offset)
            view, offset = view[count:], offset + count

    def save(self, path: Path) -> None:
        """Copies an array in memory to a file."""
        if self._memory is None:
            raise ValueError("the buffer is a file already")
        with path.open("wb", buffering=0) as file:
            for row in self._memory:
                file.write(_bytes(row.to("cpu").contiguous()))

    def restore(self, path: Path) -> None:
        """Fills an array in memory from what `save` wrote."""
        if self._memory is None:
            raise ValueError("the buffer is a file")
        stored = Buffer(self.rows, self.shape, self.dtype, path=path)
        with stored:
            for row in range(self.rows):
                self._memory[row : row + 1].copy_(stored.read(row, row + 1))

    def close(self) -> None:
        """Frees the memory, or closes the file and leaves it."""
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data).cast("B")


class Lane:
    """The hidden states of one model between two blocks, in memory or in files.

    In files (`offloaded`), a block's outputs are written beside its inputs: a killed pass reads
    these again.
    """

    def __init__(self, make: Callable[[str], Buffer], name: str, *, offloaded: bool) -> None:
        self.name, self.offloaded = name, offloaded
        self.states = make(name)
        self.spare = make(f"{name}-spare") if offloaded else self.states

    def swap(self) -> None:
        """Makes what was written last what is read next."""
        self.states, self.spare = self.spare, self.states
