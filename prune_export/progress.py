"""The interface of progress bars, and one that shows nothing.

Work takes a `Progress` and opens a task on it; the command line passes one that draws bars with an
estimate, tests and libraries the silent one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One progress bar."""

    def advance(self, steps: float = 1) -> None: ...
    def note(self, text: str) -> None:
        """Shows a short live remark beside the bar, such as the current loss."""


class Progress(Protocol):
    """Something that can show bars and lines."""

    def task(self, label: str, total: float | None = None) -> AbstractContextManager[Task]: ...
    def say(self, text: str) -> None:
        """Shows one line that stays."""


class SilentTask:
    """Shows nothing."""

    def advance(self, steps: float = 1) -> None:
        del steps

    def note(self, text: str) -> None:
        del text


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        del label, total
        yield SilentTask()

    def say(self, text: str) -> None:
        del text
