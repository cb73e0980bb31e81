"""What a piece of work takes in this process: time, processor time, and its peak of memory."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from typing import Any


class Peak:
    """The most memory that this process holds over what it held at the start."""

    def __enter__(self) -> Peak:
        import psutil

        self._process = psutil.Process()
        self._before = self._most = self._process.memory_info().rss
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        self.bytes = self._most - self._before

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._most = max(self._most, self._process.memory_info().rss)


def measured(work: Callable[[], None]) -> dict[str, Any]:
    with Peak() as peak:
        wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        work()
        after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_over_imports_bytes": peak.bytes,
    }
