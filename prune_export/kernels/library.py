"""Calls the compiled kernel from Python: for tests, for probes, and to count an engine's calls."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from prune_export.errors import CheckpointError
from prune_export.kernels.packing import Packed


class Library:
    """A loaded library of the kernel; an engine that was opened from the same file shares it."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path.resolve()))
        self._multiply = loaded.prune_export_multiply
        self._multiply.restype = ctypes.c_char_p
        self._multiply.argtypes = [
            ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
            ctypes.c_void_p,
        ]  # fmt: skip
        self._instructions = loaded.prune_export_instructions
        self._instructions.restype = ctypes.c_char_p
        self._use = loaded.prune_export_use
        self._use.restype, self._use.argtypes = ctypes.c_char_p, [ctypes.c_char_p]
        self._calls = loaded.prune_export_calls
        self._calls.restype = ctypes.c_uint64

    @property
    def instructions(self) -> str:
        """The instruction set that it uses here: `avx512`, `avx2` or `portable`."""
        return str(self._instructions().decode())

    def use(self, most: str) -> str:
        """Uses no better instruction set than this one from now on; gives the one that is used."""
        return str(self._use(most.encode()).decode())

    @property
    def calls(self) -> int:
        """How often engines in this process have called the operator so far."""
        return int(self._calls())

    def multiply(self, matrix: Packed, x: np.ndarray, *, times: int = 1) -> np.ndarray:
        """Multiplies float32 `[tokens, in]` with a packed matrix to `[tokens, out]`, in one thread.

        With int8 and int4 weights, activations are rounded to int8 in the same groups. It is done
        so many times.

        Raises:
            CheckpointError: the matrix is truncated or damaged.
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != matrix.columns:
            raise ValueError(f"got activations {x.shape}, expected [tokens, {matrix.columns}]")
        data = np.ascontiguousarray(matrix.data)
        y = np.empty((len(x), matrix.rows), np.float32)
        wrong = self._multiply(
            data.ctypes.data, data.size, x.ctypes.data, len(x), times, y.ctypes.data
        )
        if wrong:
            raise CheckpointError("packed weights", wrong.decode(), "export the engine again")
        return y
