"""The result directory: put together beside its place, then swapped in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from prune_export.errors import PlanError
from prune_export.store import Artifact, locked, place

LOCK: Final = "prune_recipe.lock.json"


def refuse_foreign(out: Path) -> None:
    """Refuses an output directory that this tool did not write.

    Raises:
        PlanError: `out` is a file, or holds something else.
    """
    _recover(out)
    if out.is_file():
        raise PlanError(str(out), "is a file, expected a directory", "give another `--out`")
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).is_file():
        raise PlanError(
            str(out),
            "is not empty and was not written by this tool",
            "give another `--out`, or empty it; nothing in it was touched",
        )


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Waits until no other run puts the same result directory together, and keeps others waiting.

    The same command given twice builds every artifact once, and both runs then come here.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):
        yield


class Result:
    """A result directory under construction; `finish` swaps it in for what was there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def add(self, artifact: Artifact, below: str = "") -> None:
        """Copies an artifact's files in."""
        for name in artifact.files:
            place(artifact.path / name, self.partial / below / name)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file, keys in the order given."""
        text = json.dumps(value, indent=1, ensure_ascii=False)
        self.write_text(name, text + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file; bytes of file names that are no text stand in it as escapes."""
        (self.partial / name).write_text(text, encoding="utf-8", errors="backslashreplace")

    def finish(self) -> Path:
        """Puts the directory in place in two renames; the next run mends a kill between them."""
        old = self.out.with_name(f".{self.out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.partial.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        return self.out


def lock_of(
    base: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
    artifacts: Mapping[str, Artifact],
    recipe_hash: str,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What exactly was done: ids and hashes, no times, no paths, no machine."""
    return {
        "lock": 1,
        "recipe_sha256": recipe_hash,
        "base": dict(base),
        "data": {name: dict(entry) for name, entry in sorted(data.items())},
        "artifacts": {
            name: {"id": artifact.id, "files": dict(sorted(artifact.files.items()))}
            for name, artifact in artifacts.items()
        },
        "versions": dict(versions),
    }


def _recover(out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    if not old.is_dir() or out.exists():
        return
    with alone(out):
        if old.is_dir() and not out.exists():
            old.rename(out)


def files_of(folder: Path) -> Iterator[Path]:
    """Every file below a directory, sorted."""
    yield from (file for file in sorted(folder.rglob("*")) if file.is_file())
