"""Prints tables that can be read at any width.

A column is narrowed only down to what still holds a few words in a line; where that is not enough,
each row is written as a heading with its values below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, Final

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from prune_export.cli.screen import Screen

_LEAST: Final = 20
"""A column of text is never narrower than this: three words or so."""

_BETWEEN: Final = 3
"""What stands between two columns."""

_MOST_WORD: Final = 36
"""Longer words, such as paths, are broken."""


def print_table(
    screen: Screen,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
) -> None:
    """Prints a table; columns in `left` start left. Line breaks in cells become blanks."""
    columns = [screen.flat(column) for column in columns]
    rows = [[screen.flat(cell) for cell in row] for row in rows]
    if title:
        screen.print(Text(screen.flat(title), style="italic"))
    widths = _widths(columns, rows, screen.width)
    if widths is None:
        _print_stacked(screen, columns, rows)
        return
    made = Table(show_edge=False, pad_edge=False)
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        justify: Any = "left" if number in left else "right"
        made.add_column(Text(column), justify=justify, overflow="fold", width=width)
    for row in rows:
        made.add_row(*map(Text, row))
    screen.print(made)


def print_pairs(screen: Screen, rows: Sequence[tuple[str, str]]) -> None:
    """Prints lines of a place and what is there; below each other where a place is long."""
    shown = [(screen.flat(place), screen.flat(what)) for place, what in rows]
    widest = max((cell_len(place) for place, _ in shown), default=0)
    beside = max((cell_len(what) for _, what in shown), default=0)
    together = widest + 2 + beside <= screen.width
    for place, what in shown:
        if together:
            screen.print(Text(place.ljust(widest + 2), style="bold") + Text(what))
        else:
            screen.print(Text(place, style="bold"), overflow="fold")
            _print_indented(screen, what)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """How wide each column is; None where there is no room for all of them."""
    cells = [[column, *(row[i] for row in rows)] for i, column in enumerate(columns)]
    widths = [max(map(cell_len, column)) for column in cells]
    least = [
        min(width, max(_LEAST, min(_MOST_WORD, max(_longest_word(cell) for cell in column))))
        for width, column in zip(widths, cells, strict=True)
    ]
    room -= _BETWEEN * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        wide = [i for i in range(len(widths)) if widths[i] > least[i]]
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def _print_stacked(screen: Screen, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        heading = f"{columns[0]} {row[0]}" if columns[0] and row[0].isdecimal() else row[0]
        screen.print(Text(heading, style="bold"), overflow="fold")
        line = ""
        for column, cell in zip(columns[1:], row[1:], strict=True):
            if not cell:
                continue
            value = f"{column}: {cell}"
            if line and 2 + cell_len(line) + 3 + cell_len(value) > screen.width:
                _print_indented(screen, line)
                line = ""
            line = f"{line}   {value}" if line else value
        if line:
            _print_indented(screen, line)


def _print_indented(screen: Screen, text: str) -> None:
    lines = textwrap.wrap(
        text,
        max(screen.width, 24),
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    for line in lines:
        screen.put(line)
