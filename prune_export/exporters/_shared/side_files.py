"""Carries beside an engine what belongs to its model: config, tokenizer, chat template, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from prune_export.checkpoint import Checkpoint


def copy_side_files(opened: Checkpoint, out: Path, *, replacing: bool = True) -> None:
    """Copies a checkpoint's config and side files into `out`, as the checkpoint has them.

    With `replacing` false, a file that the exporter wrote there itself stays.

    Raises:
        CheckpointError: one is a link out of the checkpoint, no regular file, or far too long.
    """
    files = (opened.path / "config.json", *opened.side_files())
    copy_files((file for file in files if replacing or not (out / file.name).exists()), out)


def copy_files(files: Iterable[Path], out: Path) -> None:
    """Copies files into `out`; a killed run leaves no half of one under its name."""
    for file in files:
        half = out / f"{file.name}.partial"
        shutil.copyfile(file, half)
        half.replace(out / file.name)
