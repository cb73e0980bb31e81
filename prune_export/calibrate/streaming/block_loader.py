"""Loads a model's blocks one after the other, reading the next one from disk meanwhile."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, Self

import psutil
import torch

from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel

_KEPT: Final = 256 << 20
"""Bytes that the C library may keep of what was freed."""


def loaded(layerwise: LayerwiseModel, layers: Iterable[int]) -> Iterator[int]:
    """Loads each of `layers` in turn, and frees it when the next one is asked for."""
    order = list(layers)
    with ThreadPoolExecutor(1) as reader, _Heap() as heap:
        ahead: Future[dict[str, torch.Tensor]] | None = None
        for at, layer in enumerate(order):
            tensors = ahead.result() if ahead else _read(layerwise, layer)
            ahead = None
            if at + 1 < len(order):
                ahead = reader.submit(_read, layerwise, order[at + 1])
            layerwise.load(layer, tensors)
            yield layer
            layerwise.free(layer)
            heap.trim()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of torch's threads inside a `with`."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(layerwise: LayerwiseModel, layer: int) -> dict[str, torch.Tensor]:
    read = layerwise.read(layerwise.arch.block(layer))
    if layerwise.device == "cuda":
        read = {name: tensor.pin_memory() for name, tensor in read.items()}
    return read


class _Heap:
    """Lets glibc keep some freed memory for the next block, and returns it at the end.

    By default it hands the end of the heap back at once, and a tenth of a pass over a small model
    goes into getting it again, page by page; but of what two threads allocate and free in turns it
    keeps ever more, 30 MB a block of a model of two billion parameters.
    """

    def __init__(self) -> None:
        _keep()
        self._least = _resident()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _hand_back()

    def trim(self) -> None:
        """Returns freed memory to the system where this process has grown by more than it may."""
        now = _resident()
        self._least = min(self._least, now)
        if now - self._least > _KEPT:
            _hand_back()
            self._least = _resident()


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


@cache
def _c_library() -> Any:
    return ctypes.CDLL(None) if os.name == "posix" else None


def _hand_back() -> None:
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _keep() -> None:
    """Lets glibc keep up to `_KEPT` at the end of the heap, in the whole process and for good."""
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, _KEPT)
        # Else setting the other would fix it where it happens to be. This is what it grows to.
        mallopt(mmap_threshold, 32 << 20)
