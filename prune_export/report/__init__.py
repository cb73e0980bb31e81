"""Makes the report of a run: summary table, figures, a self-contained page, a model card.

Everything is made from one report.json, whose form `reading` states; nothing here measures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune_export.report.benchmarks import eval_result_files
from prune_export.report.card import model_card
from prune_export.report.caveats import Caveat, caveats, failed
from prune_export.report.figures import draw_figures, draw_inspection, draw_summary
from prune_export.report.html import render_page
from prune_export.report.reading import Report
from prune_export.report.table import (
    COLUMNS,
    Row,
    markdown,
    summary_html,
    summary_rows,
    where_to_look,
)

__all__ = [
    "COLUMNS", "Caveat", "Report", "Row", "caveats", "draw_figures", "draw_inspection",
    "draw_summary", "failed", "markdown",
    "model_card", "render_page", "summary_html", "summary_rows", "where_to_look", "write_report",
]  # fmt: skip


def write_report(
    report: Report | Mapping[str, Any], out: Path, *, repo_id: str | None = None
) -> list[Path]:
    """Writes figures/, report.html and README.md into `out`; the same report gives the same bytes.

    Where a benchmark of the Hub was measured, its score lies in `.eval_results/`.

    `repo_id` is the Hub repository that the card's examples load from, where it is known.
    """
    report = Report.of(report)
    written = draw_figures(report, out / "figures")
    pages = eval_result_files(report) | {
        "report.html": render_page(report, out / "figures"),
        "README.md": model_card(report, repo_id=repo_id),
    }
    for name, text in pages.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written
