"""What plans and reports look like in a notebook: the tables of the terminal, escaped."""

from __future__ import annotations

from pathlib import Path

from prune_export import Machine, Options, Recipe, RunResult, plan
from prune_export.report import Report, summary_html, summary_rows
from tests.report.variants import FULL, HOSTILE, made

RECIPE = """\
recipe: 1
stages:
  - prune: {method: deepest, remove: 2}
"""


def test_a_plan_shows_its_steps(tiny_llama: Path, tmp_path: Path) -> None:
    options = Options(out=tmp_path / "out", store=tmp_path / "store", machine=Machine.detect())
    shown = plan(Recipe.parse(RECIPE), str(tiny_llama), options)._repr_html_()
    assert "6 → 4" in shown
    assert "prune: deepest" in shown
    assert "peak RAM" in shown


def test_a_report_shows_its_summary_and_nothing_that_runs() -> None:
    checks = Report.of(FULL).verification
    assert checks is not None
    shown = RunResult(Path("out"), FULL, checks)._repr_html_()
    assert shown.count("<tr>") == 1 + len(summary_rows(FULL))
    hostile = made("full") | {"recipe": {"name": "r", "text": "", "description": HOSTILE}}
    shown = summary_html(hostile)
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;" in shown
