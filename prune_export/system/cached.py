"""Tells the Hub cache's own links from links that lead out of a model directory.

    CACHE/models--org--name/snapshots/COMMIT/onnx/model.onnx -> ../../../blobs/ETAG
    CACHE/models--org--name/blobs/ETAG                          a file, or since huggingface_hub 2
    CACHE/models--org--name/blobs/ETAG -> ../../blobs/f3/HASH   a link to what repositories share

Source: huggingface_hub, `file_download` and `utils/_shared_blobs`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

_REPOSITORY: Final = re.compile(r"(models|datasets|spaces)--.+")
_SHARED: Final = re.compile(r"[0-9a-f]{64}")


def is_within(file: Path, folder: Path) -> bool:
    """Whether `file`, a path below `folder`, belongs to the same model when links are followed.

    It lies in `folder`, or `folder` is in a snapshot of the Hub's cache and `file` is a link into
    the blobs of the same repository. Whether it exists is another question.
    """
    named = Path(os.path.normpath(folder.absolute() / file.absolute()))
    if not named.is_relative_to(os.path.normpath(folder.absolute())):
        return False
    real, home = Path(os.path.realpath(named)), Path(os.path.realpath(folder))
    if real.is_relative_to(home):
        return True
    repository = _repository(home)
    if repository is None or not named.is_symlink():
        return False
    inside = Path(os.path.realpath(named.parent))
    hop = Path(os.path.normpath(inside / os.readlink(named)))
    if not inside.is_relative_to(home) or hop.parent != repository / "blobs":
        return False
    shared = repository.parent / "blobs"
    return real == hop or (
        real == shared / real.name[:2] / real.name and bool(_SHARED.fullmatch(real.name))
    )


def _repository(home: Path) -> Path | None:
    """Finds the cached repository whose snapshot holds the directory `home`, links followed."""
    for at in (home, *home.parents):
        if at.parent.name == "snapshots" and _REPOSITORY.fullmatch(at.parent.parent.name):
            return at.parent.parent
    return None
