"""docs/results.md is what the committed runs say."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import results_page  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    text = results_page.PAGE.read_text(encoding="utf-8")
    assert text == results_page.page(results_page.RESULTS), "run benchmarks/results_page.py"


def test_a_benchmark_without_a_run_has_no_section(tmp_path: Path) -> None:
    assert "## " not in results_page.page(tmp_path)
