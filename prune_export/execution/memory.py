"""The memory of this process and all that it has started, looked at now and then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

import psutil

_EVERY_S: Final = 2.0
"""Seldom enough not to disturb what is timed: a look takes about a millisecond."""


@dataclass
class Peak:
    """The largest sum seen so far, in bytes; 0 where nobody looked yet."""

    ram_bytes: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Sums the resident memory of the processes."""
        own = psutil.Process()
        found = 0
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                found += process.memory_info().rss
        self.ram_bytes = max(self.ram_bytes, found)

    def keep_looking(self) -> None:
        """Looks until it is over."""
        while not self.over.wait(_EVERY_S):
            with suppress(psutil.Error, OSError):
                self.look()


@contextmanager
def memory_watched() -> Iterator[Peak]:
    """Watches, in a thread, the memory of this process and its children during a `with`.

    What is shared between them, such as mapped weights, counts in each.
    """
    peak = Peak()
    thread = threading.Thread(target=peak.keep_looking, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.over.set()
        thread.join()
