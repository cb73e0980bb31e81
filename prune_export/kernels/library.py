"""Calls the compiled kernel from Python: for tests, for probes, and to count an engine's calls."""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from prune_export.errors import CheckpointError
from prune_export.kernels.packing import Packed


class Library:
    """A loaded library of the kernel; an engine that was opened from the same file shares it."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path.resolve()))
        text, whole, place = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p

        def function(name: str, result: Any, *given: Any) -> Any:
            found = getattr(loaded, f"prune_export_{name}")
            found.restype, found.argtypes = result, list(given)
            return found

        self._hold = function("hold", place, place, whole, whole, ctypes.POINTER(text))
        self._release = function("release", None, place)
        self._multiply = function("multiply", None, place, place, whole, place)
        self._read = function("read", ctypes.c_uint64, place, whole)
        self._instructions = function("instructions", text)
        self._use = function("use", text, text)
        self._calls = function("calls", ctypes.c_uint64)

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

    def read(self, memory: np.ndarray) -> int:
        """Reads bytes uint8 as fast as memory gives them; the sum of their words of eight."""
        return int(self._read(memory.ctypes.data, memory.size))

    def hold(self, matrix: Packed, tokens: int = 1) -> Held:
        """Checks a matrix and holds it, to be multiplied with at most so many tokens at once.

        Raises:
            CheckpointError: the matrix is truncated or damaged.
        """
        data, wrong = np.ascontiguousarray(matrix.data), ctypes.c_char_p()
        held = self._hold(data.ctypes.data, data.size, max(tokens, 1), ctypes.byref(wrong))
        if not held:
            reason = (wrong.value or b"").decode()
            raise CheckpointError("packed weights", reason, "export the engine again")
        return Held(matrix, max(tokens, 1), held, self._multiply, self._release)

    def multiply(self, matrix: Packed, x: np.ndarray) -> np.ndarray:
        """Multiplies float32 `[tokens, in]` with a packed matrix; see `hold` and `Held`."""
        return self.hold(matrix, len(x)).multiply(x)


class Held:
    """A matrix in the kernel's memory, freed with this object."""

    def __init__(self, matrix: Packed, tokens: int, held: int, multiply: Any, release: Any) -> None:
        self._matrix, self._tokens, self._held, self._multiply = matrix, tokens, held, multiply
        weakref.finalize(self, release, held)

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """Multiplies float32 `[tokens, in]` to `[tokens, out]`, in one thread.

        With int8 and int4 weights, activations are rounded to int8 in the same groups.
        """
        x = np.ascontiguousarray(x, np.float32)
        if x.ndim != 2 or x.shape[1] != self._matrix.columns or len(x) > self._tokens:
            raise ValueError(
                f"got activations {x.shape}, expected up to {self._tokens} tokens of "
                f"{self._matrix.columns} inputs"
            )
        y = np.empty((len(x), self._matrix.rows), np.float32)
        self._multiply(self._held, x.ctypes.data, len(x), y.ctypes.data)
        return y
