"""How the command line shows things: bars on a terminal, spaced lines in a log, tables, errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)
from rich.table import Table
from rich.text import Text

from prune_export.errors import PruneExportError
from prune_export.progress import Progress, Silent, Task
from prune_export.units import text_from_seconds

_LINE_EVERY_S: Final = 15.0
_LOG_WIDTH: Final = 120

errors = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _LOG_WIDTH)
output = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_WIDTH)


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.id = bars, task

    def advance(self, steps: float = 1) -> None:
        self.bars.advance(self.id, steps)

    def note(self, text: str) -> None:
        self.bars.update(self.id, note=text)


class Terminal:
    """Bars with an estimate, drawn on standard error while work goes on."""

    def __init__(self) -> None:
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=errors,
            transient=True,
        )
        self.began = time.monotonic()

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        if not self.bars.live.is_started:
            self.bars.start()
        task = self.bars.add_task(label, total=total, note="")
        try:
            yield _Bar(self.bars, task)
        finally:
            self.bars.remove_task(task)
            if not self.bars.tasks:
                self.bars.stop()

    def say(self, text: str) -> None:
        stamp = text_from_seconds(time.monotonic() - self.began)
        self.bars.console.print(Text(f"{stamp:>12}  ", style="dim") + Text(text))


class _Line:
    def __init__(self, label: str, total: float | None) -> None:
        self.label, self.total, self.done, self.text = label, total, 0.0, ""
        self.began = self.told = time.monotonic()

    def advance(self, steps: float = 1) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self.told >= _LINE_EVERY_S:
            self.told = now
            left, of = "", f" of {self.total:.0f}" if self.total else ""
            if self.total and 0.03 * self.total <= self.done < self.total:
                rest = (now - self.began) / self.done * (self.total - self.done)
                left = f", {text_from_seconds(rest)} left"
            note = f" ({self.text})" if self.text else ""
            errors.print(Text(f"{'':14}{self.label}: {self.done:.0f}{of}{left}{note}"))

    def note(self, text: str) -> None:
        self.text = text


class Log:
    """A line now and then, for a log file or a pipe."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        yield _Line(label, total)

    def say(self, text: str) -> None:
        stamp = text_from_seconds(time.monotonic() - self.began)
        errors.print(Text(f"{stamp:>12}  {text}"))


def progress(*, quiet: bool) -> Progress:
    """What suits where standard error goes."""
    if quiet:
        return Silent()
    return Terminal() if sys.stderr.isatty() else Log()


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    wrapped: Sequence[int] = (0,),
    left: Sequence[int] = (0,),
) -> None:
    """Prints a table on standard output; columns in `left` start left, those in `wrapped` wrap."""
    made = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        justify: Any = "left" if number in left else "right"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=number not in wrapped)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    output.print(made)


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Prints lines of a place and what is there."""
    made = Table.grid(padding=(0, 2))
    for place, what in rows:
        made.add_row(Text(place, style="bold"), Text(what))
    output.print(made)


def print_json(value: Any) -> None:
    """Prints JSON on standard output, and nothing else there."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def show_error(error: PruneExportError, *, as_json: bool) -> None:
    """Prints an error: three lines on standard error, or an object on standard output."""
    if as_json:
        print_json(
            {
                "error": {
                    "kind": type(error).__name__,
                    "where": error.where,
                    "problem": error.problem,
                    "fix": error.fix,
                }
            }
        )
        return
    errors.print(Text("error  ", style="bold red") + Text(error.where, style="bold"))
    errors.print(Text("  " + error.problem))
    if error.fix:
        errors.print(Text("  " + error.fix, style="cyan"))
