"""Output of the command line: progress bars on a terminal, lines in a log, tables, errors.

All of it is written through two `Screen`s, which let nothing act on the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

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
from rich.text import Text

from prune_export.cli.grids import print_pairs, print_table
from prune_export.cli.screen import Screen, in_encoding
from prune_export.display.escapes import json_escaped
from prune_export.errors import PruneExportError
from prune_export.progress import Progress, Silent, Task
from prune_export.units import text_from_seconds

_LINE_EVERY_S: Final = 15.0
_LOG_WIDTH: Final = 120


def _width(terminal: bool) -> int | None:
    """None is the terminal's own, or what COLUMNS says."""
    return None if terminal or os.environ.get("COLUMNS", "").isdigit() else _LOG_WIDTH


errors = Screen(stderr=True, width=_width(sys.stderr.isatty()))
output = Screen(width=_width(sys.stdout.isatty()))


class _Bar:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self.bars, self.id = bars, task

    def advance(self, steps: float = 1) -> None:
        self.bars.advance(self.id, steps)

    def note(self, text: str) -> None:
        self.bars.update(self.id, note=errors.flat(text))


class Terminal:
    """Progress bars with an estimate, on standard error."""

    def __init__(self) -> None:
        self.bars = Bars(
            SpinnerColumn("dots" if errors.encoding.startswith("utf") else "line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=errors,
            transient=True,
        )
        self.began = time.monotonic()

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        if not self.bars.live.is_started:
            self.bars.start()
        task = self.bars.add_task(errors.flat(label), total=total, note="")
        try:
            yield _Bar(self.bars, task)
        finally:
            self.bars.remove_task(task)
            if not self.bars.tasks:
                self.bars.stop()

    def say(self, text: str) -> None:
        stamp = text_from_seconds(time.monotonic() - self.began)
        self.bars.console.print(Text(f"{stamp:>12}  ", style="dim") + Text(errors.flat(text)))


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
            errors.put(" " * 14 + errors.flat(f"{self.label}: {self.done:.0f}{of}{left}{note}"))

    def note(self, text: str) -> None:
        self.text = text


class Log:
    """Progress as a line now and then, for a log file or a pipe."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        yield _Line(label, total)

    def say(self, text: str) -> None:
        stamp = text_from_seconds(time.monotonic() - self.began)
        errors.put(f"{stamp:>12}  {errors.flat(text)}")


def progress(*, quiet: bool) -> Progress:
    """Chooses bars or lines, by where standard error goes."""
    if quiet:
        return Silent()
    return Terminal() if sys.stderr.isatty() else Log()


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
) -> None:
    """Prints a table on standard output, as wide as there is room; columns in `left` start left."""
    print_table(output, title, columns, rows, left=left)


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Prints lines of a place and what is there."""
    print_pairs(output, rows)


def print_json(value: Any) -> None:
    """Prints JSON on standard output, and nothing else there."""
    unicode = in_encoding("×", output.encoding) == "×"
    text = json.dumps(value, indent=1, ensure_ascii=not unicode, default=str)
    sys.stdout.write(json_escaped(text) + "\n")


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
    show_problem(error.where, error.problem, error.fix)


def show_problem(where: str, problem: str, fix: str = "") -> None:
    """Prints three lines on standard error: where, what, and what to do."""
    errors.print(Text("error  ", style="bold red") + errors.text(where, "bold"))
    errors.print(errors.text("  " + problem))
    if fix:
        errors.print(errors.text("  " + fix, "cyan"))
