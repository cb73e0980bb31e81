"""Stops Python code of strangers that does not end, such as a chat template's loop.

An exception is raised in the thread that runs it, between two of its steps. What is one step to
Python (`'a' * 10**11`) cannot be stopped so.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psutil

from prune_export.units import GIB

SECONDS: Final = 30.0
"""What takes longer does not end, however busy the machine: a conversation takes milliseconds."""

MOST_BYTES: Final = 2 * GIB
_LOOK_EVERY: Final = 0.1


class TookTooMuch(Exception):
    """Raised in code that took more time, or memory, than it may."""


@contextmanager
def bounded(seconds: float | None = None, most_bytes: int | None = None) -> Iterator[None]:
    """Raises in the code inside a `with` once it has run so long, or the process grown so much.

    Raises:
        TookTooMuch: it has.
    """
    seconds = SECONDS if seconds is None else seconds
    most_bytes = MOST_BYTES if most_bytes is None else most_bytes
    thread, over, lock = threading.get_ident(), threading.Event(), threading.Lock()
    begun = threading.Event()  # not before there is a `try`
    watcher = threading.Thread(
        target=_watch, args=(thread, begun, over, lock, seconds, most_bytes), daemon=True
    )
    watcher.start()
    try:
        begun.set()
        yield
    finally:
        with lock:
            over.set()
        _raise_in(thread, None)  # what was to be raised and has not been yet
        watcher.join()


def _watch(
    thread: int,
    begun: threading.Event,
    over: threading.Event,
    lock: threading.Lock,
    seconds: float,
    most_bytes: int,
) -> None:
    begun.wait()
    until, before = time.monotonic() + seconds, 0
    while not over.wait(min(_LOOK_EVERY, seconds)):
        held = psutil.Process().memory_info().rss
        before = before or held
        if time.monotonic() >= until or held - before > most_bytes:
            with lock:
                if not over.is_set():
                    _raise_in(thread, TookTooMuch)
            return


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    """Lets an exception be raised in a thread, or takes back the one that was to be."""
    wanted = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), wanted)
