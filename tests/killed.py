"""Progress that dies in the middle, as a killed process does: nothing after it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Killed(BaseException):
    """What no code catches: files stay as they are."""


class Watched:
    """A progress that tells a function of every advance: the task's label and the steps."""

    def __init__(self, advanced: Callable[[str, float], None]) -> None:
        self._advanced = advanced

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Any]:
        del total
        advanced = self._advanced

        class Task:
            def advance(self, steps: float = 1) -> None:
                advanced(label, steps)

            def note(self, text: str) -> None:
                del text

        yield Task()

    def say(self, text: str) -> None:
        del text


def killed_after(count: int, *, single: bool = False) -> Watched:
    """Dies at the `count`-th advance; with `single`, of those by one (others go on from a save)."""
    left = count

    def advanced(_label: str, steps: float) -> None:
        nonlocal left
        if single and steps != 1:
            return
        left -= 1
        if left <= 0:
            raise Killed

    return Watched(advanced)


def killed_at(step: int, task: str = "healing") -> Watched:
    """Dies at a step of a task."""
    done = 0.0

    def advanced(label: str, steps: float) -> None:
        nonlocal done
        if label == task:
            done += steps
            if done >= step:
                raise Killed

    return Watched(advanced)
