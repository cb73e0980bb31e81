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
        ("---\nprice: !!float x\nlicense: mit\n---\n", "mit"),
        ("---\ndate: !!timestamp x\nwhen: 2020-99-99\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: !!float x\n---\n", None),
        ("---\nlicense: !!python/object:os.system mit\n---\n", None),
        ('---\na: "\\UFFFFFFFF"\nlicense: mit\n---\n', None),
        ('---\nlicense: "a\\e[31m"\n---\n', None),
        ("---\nlicense: mit\na: " + "[" * 30_000 + "\n---\n", None),
        ("---\nlicense: mit\na: " + "{a: " * 10_000 + "\n---\n", None),
        ("---\nlicense: " + "x" * 200 + "\n---\n", None),
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
