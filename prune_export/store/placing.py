"""Copies files out of a store, sharing their blocks where the file system can."""

from __future__ import annotations

import shutil
from pathlib import Path

from prune_export.system.platforms import share_blocks


def place(source: Path, target: Path) -> None:
    """Copies a file, sharing its blocks where the file system can; never a hard link.

    So an edit of the copy never reaches the source.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            share_blocks(reader.fileno(), writer.fileno())
    except OSError:
        shutil.copyfile(source, target)
