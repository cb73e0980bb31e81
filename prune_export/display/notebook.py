"""Tables for notebooks: what `_repr_html_` of plans and reports returns."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from prune_export.display.escapes import escaped


def html_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    """Writes a table as HTML; every text is escaped, numbers stand at the right."""
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{"right" if place else "left"}">{_text(cell)}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    after = f"<p>{_text(note)}</p>" if note else ""
    return (
        f"<table><caption>{_text(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{after}"
    )


def _text(text: str) -> str:
    return escape(escaped(" ".join(text.split())))
