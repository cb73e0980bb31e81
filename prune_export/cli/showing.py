"""Prints a plan and the summary of a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prune_export.cli import console
from prune_export.units import text_from_bytes, text_from_count, text_from_seconds

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
    rows = []
    for stage in planned.stages:
        change = f"{stage.after.layers}"
        if stage.before.layers != stage.after.layers:
            change = f"{stage.before.layers} → {stage.after.layers}"
        rows.append((
            f"{stage.kind}: {stage.name}" + (f" ({stage.note})" if stage.note else ""),
            change, text_from_count(stage.after.parameters), text_from_bytes(stage.after.bytes),
            text_from_bytes(stage.cost.ram_bytes), text_from_bytes(stage.cost.disk_bytes),
            text_from_seconds(stage.seconds),
        ))  # fmt: skip
    columns = ["step", "blocks", "parameters", "weights", "peak RAM", "disk", "about"]
    console.table(f"{planned.recipe} on {planned.model} ({planned.family})", columns, rows)
    gpu = ""
    if planned.machine.device == "cuda":
        gpu = f", GPU memory {text_from_bytes(planned.peak_gpu_bytes)}"
    console.output.put(
        f"peak RAM {text_from_bytes(planned.peak_ram_bytes)}{gpu}, disk "
        f"{text_from_bytes(planned.disk_bytes)}, about {text_from_seconds(planned.seconds)} "
        f"with {planned.machine.threads} threads on {planned.machine.device}"
    )


def show_report(report: Mapping[str, Any], out: Path) -> None:
    """Prints the summary of a run, and where its parts lie."""
    from prune_export.report import COLUMNS, summary_rows, where_to_look

    rows = [row.cells for row in summary_rows(report)]
    console.table(report["recipe"]["description"] or report["recipe"]["name"], COLUMNS, rows)
    console.output.put()
    console.pairs([(str(out / place), what) for place, what in where_to_look(report)])
