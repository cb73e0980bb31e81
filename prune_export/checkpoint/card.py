"""What a model directory's own card says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

_HEAD_BYTES: Final = 64 * 1024
"""A card's metadata is at its beginning; the rest of a README is never read."""


def card_license(folder: Path) -> str | None:
    """The licence id in the metadata of a directory's README.md; None where it says none."""
    try:
        with (folder / "README.md").open("rb") as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    parts = head.replace("\r\n", "\n").split("\n---", 1)
    if not head.startswith("---") or len(parts) != 2:
        return None
    try:
        metadata: Any = yaml.safe_load(parts[0].removeprefix("---"))
    except yaml.YAMLError:
        return None
    said = metadata.get("license") if isinstance(metadata, dict) else None
    return said if isinstance(said, str) and said else None
