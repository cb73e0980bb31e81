"""Keeps answers as they come, so that a run that is killed asks for none of them again."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from prune_export.calibrate import Sample, read_samples

_FILE: Final = "answers.jsonl"


class Journal:
    """A file in a scratch directory to which answers are added; each is on the disk then."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        self._path = scratch / _FILE
        self._path.touch()
        self.samples: list[Sample] = read_samples(self._path)
        self.keep_first(len(self.samples))  # without a line that was cut off

    def keep_first(self, count: int) -> None:
        """Forgets all but the first `count` answers."""
        self.samples = self.samples[:count]
        with self._path.open("r+b") as file:
            for _ in self.samples:
                file.readline()
            file.truncate(file.tell())

    def add(self, samples: Iterable[Sample]) -> None:
        """Adds answers."""
        added = list(samples)
        with self._path.open("ab") as file:
            file.write(b"".join(one.line() for one in added))
            file.flush()
            os.fsync(file.fileno())
        self.samples += added
