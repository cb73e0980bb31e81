"""Prints text safely to a terminal: no markup, no control characters, nothing unencodable.

Descriptions, paths, names and messages come from recipes, models and other programs. A `Screen`
shows any text as it stands, and as an escape what would move the cursor, turn the direction of
writing or be no character at all. Where the stream is not UTF-8, usual signs get their ASCII
spelling and others an escape, so that no run ends at a log in another encoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from prune_export.display.escapes import escaped

_SPELT: Final = str.maketrans(
    {
        "×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "→": "->", "≤": "<=", "≥": ">=",
        "≠": "!=", "·": "*", "•": "*", "±": "+-", "\u2018": "'", "\u2019": "'", "“": '"', "”": '"',
        "π": "pi", "\xa0": " ", "\u202f": " ", "✓": "ok", "━": "-", "╸": "-", "╺": "-",
        "│": "|", "─": "-",
    }
)  # fmt: skip


def in_encoding(text: str, encoding: str) -> str:
    """Replaces what a stream of that encoding cannot take."""
    if encoding.lower().startswith("utf"):
        return text
    return text.translate(_SPELT).encode(encoding, "backslashreplace").decode(encoding)


class Screen(Console):
    """A console on which nothing is markup, and on which nothing is written that is not seen."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def shown(self, text: str) -> str:
        """The text as it may be laid out: its length is that of what is written."""
        return in_encoding(escaped(text), self.encoding)

    def flat(self, text: str) -> str:
        """The same on one line."""
        return self.shown(" ".join(text.split()) if "\n" in text else text)

    def text(self, text: str, style: str = "") -> Text:
        """A `Text` of it, for tables and bars."""
        return Text(self.shown(text), style=style)

    def put(self, text: str = "") -> None:
        """Prints text that is not wrapped, so that paths in it can be copied."""
        self.print(text, soft_wrap=True)

    def render_str(self, text: str, **how: Any) -> Text:
        """Every `str` that is printed, or stands in a table, comes here."""
        return super().render_str(self.shown(text), **(how | {"markup": False, "emoji": False}))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Whatever was made elsewhere (tracebacks, a `Text` by hand) is looked at once more."""
        for segment in super().render(renderable, options):
            if segment.control or (segment.text.isascii() and segment.text.isprintable()):
                yield segment
            else:
                yield Segment(self.shown(segment.text), segment.style)
