from __future__ import annotations

from pathlib import Path

from docs.families_page import page

FILE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_says_what_the_tests_prove() -> None:
    """Written by `python -m docs.families_page > docs/families.md`."""
    assert FILE.read_text(encoding="utf-8") == page()
