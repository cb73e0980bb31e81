"""Work that is given up when its time is out: it hears so from its own progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from prune_export.errors import PruneExportError
from prune_export.execution.context import RunContext
from prune_export.progress import Progress, Task


class OutOfTime(PruneExportError):
    """Optional work was given up, as what must follow needs the time that is left."""


def optional(context: RunContext, late: Callable[[], bool]) -> RunContext:
    """A context whose work is given up, with `OutOfTime`, as soon as it goes on and is `late`.

    Without a limit of time it is the context itself. What another process does goes on.
    """
    if context.pace.budget is None:
        return context
    return replace(context, progress=_Interrupting(context.progress, late))


@dataclass(frozen=True)
class _Interrupting:
    inner: Progress
    late: Callable[[], bool]

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        with self.inner.task(label, total) as task:
            yield _InterruptingTask(task, self.late)

    def say(self, text: str) -> None:
        self.inner.say(text)


@dataclass(frozen=True)
class _InterruptingTask:
    inner: Task
    late: Callable[[], bool]

    def advance(self, steps: float = 1) -> None:
        self.inner.advance(steps)
        if self.late():
            raise OutOfTime(
                "--time", "what must follow needs the time that is left", "allow more time"
            )

    def note(self, text: str) -> None:
        self.inner.note(text)
