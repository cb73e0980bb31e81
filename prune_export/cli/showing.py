"""Prints a plan and the summary of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prune_export.cli import console

if TYPE_CHECKING:
    from prune_export.planning import Plan


def show_plan(planned: Plan, *, as_json: bool) -> None:
    """Shows a plan, and after it what this machine lacks for it."""
    if as_json:
        console.print_json(planned.to_json())
        if planned.lacking:
            raise typer.Exit(2)
        return
    _show_stages(planned)
    for note in planned.notes:
        console.output.put(note)
    for error in planned.lacking[1:]:
        console.show_error(error, as_json=False)
    planned.check()


def _show_stages(planned: Plan) -> None:
    from prune_export.planning.rows import columns_of, rows_of, sums_of, title_of

    console.table(title_of(planned), columns_of(planned), rows_of(planned))
    console.output.put(sums_of(planned))


def show_report(report: Mapping[str, Any], out: Path) -> None:
    """Prints the summary of a run, and where its parts lie."""
    from prune_export.report import COLUMNS, summary_rows, where_to_look

    rows = [row.cells for row in summary_rows(report)]
    console.table(report["recipe"]["description"] or report["recipe"]["name"], COLUMNS, rows)
    console.output.put()
    console.pairs([(str(out / place), what) for place, what in where_to_look(report)])
