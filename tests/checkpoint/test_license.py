"""The licence of a base model, from what lies beside its weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_export.checkpoint import card_license


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\ntext", "mit"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("# No metadata\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_cards_metadata(
    text: str, expected: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert card_license(tmp_path) == expected


def test_no_card_says_no_licence(tmp_path: Path) -> None:
    assert card_license(tmp_path) is None
