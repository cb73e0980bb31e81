"""Reads which files of a result directory this tool wrote, from the directory's own lists.

    prune_recipe.lock.json      names each file of the result
    SHA256SUMS                  their hashes, those of measured files too, which no lock can have
    .prune-export/swap.json     while a result is swapped in: what goes out and what comes in

A lock of earlier versions names no files; there the files of its artifacts and the names that every
result had are taken. What a list says is only believed of what lies below the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Final

from prune_export import registry
from prune_export.errors import PruneExportError
from prune_export.system.platforms import open_flags
from prune_export.units import MIB

LOCK: Final = "prune_recipe.lock.json"
SUMS: Final = "SHA256SUMS"
WORK: Final = ".prune-export"
HELD: Final = ".prune-export.lock"
ABOUT: Final = "README.txt"
JOURNAL: Final = "swap.json"

FIGURES: Final = "figures"

_EARLIER: Final = (
    LOCK, "prune_recipe.yaml", "report.json", "report.html", "README.md", "verify.json",
    f"{FIGURES}/*.png",
)  # fmt: skip
"""What every result of earlier versions had besides its artifacts' files."""

_QUIETLY: Final = open_flags("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC")
_LIST_BYTES: Final = 64 * MIB


def is_work(folder: Path) -> bool:
    """Whether a directory is the work directory of a run of this tool."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {name for name in os.listdir(folder) if not name.startswith(f".{JOURNAL}.")}
    return not names or (ABOUT in names and names <= {ABOUT, JOURNAL, "new", "old"})


def listed(folder: Path) -> dict[str, str | None]:
    """Reads the files that a result's lists name: name -> hash, None where it is not known."""
    lock = _json(folder / LOCK)
    if not isinstance(lock, dict):
        return {}
    own = _of_artifacts(lock)
    names = lock.get("files")
    if isinstance(names, list):
        found = dict.fromkeys(name for name in names if is_inside(name))
        return found | {name: own[name] for name in own if name in found} | _sums(folder, found)
    return own | {
        name: None
        for name in files_of(folder)
        if name not in own and any(_matches(name, pattern) for pattern in _EARLIER)
    }


def journaled(work: Path) -> dict[str, str | None]:
    """Lists the files, old and new, of an unfinished swap."""
    journal = journal_of(work)
    return {name: None for names in journal.values() for name in names} if journal else {}


def journal_of(work: Path) -> dict[str, list[str]] | None:
    """Reads a swap's journal: the files taken out and brought in; None where none was begun."""
    found = _json(work / JOURNAL)
    if not isinstance(found, dict) or found.keys() != {"old", "new"}:
        return None
    if not all(isinstance(names, list) and all(map(is_inside, names)) for names in found.values()):
        return None
    return found


def files_of(folder: Path) -> Iterator[str]:
    """Lists the files below a directory, sorted; links are not followed."""
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            yield Path(place, file).relative_to(folder).as_posix()


def is_inside(name: Any) -> bool:
    """Whether a listed name stays below the directory of its list."""
    if not isinstance(name, str) or not name or "\0" in name or name.startswith("/"):
        return False
    return name == PurePosixPath(name).as_posix() and ".." not in name.split("/") and name != "."


def sums_text(hashes: Mapping[str, str]) -> str:
    """Writes SHA256SUMS, as `sha256sum --check` reads it."""
    lines = []
    for name, digest in sorted(hashes.items()):
        escaped = name.replace("\\", "\\\\").replace("\n", "\\n")
        lines.append(f"{'' if escaped == name else chr(92)}{digest}  {escaped}\n")
    return "".join(lines)


def sha256_of(file: Path) -> str:
    """Hashes a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _of_artifacts(lock: Mapping[str, Any]) -> dict[str, str | None]:
    """Lists the files of a result that come from artifacts: the last stage's, and each engine's."""
    artifacts = lock.get("artifacts")
    if not isinstance(artifacts, dict):
        return {}
    stages = [artifact for artifact in artifacts if artifact.startswith("stages.")]
    placed = dict.fromkeys(stages[-1:], "")  # the list goes from the first to the last
    for artifact in artifacts:
        kind, _, exporter = artifact.partition(".")
        if kind == "export":
            placed[artifact] = f"{_folder(exporter)}/"
    found: dict[str, str | None] = {}
    for artifact, below in placed.items():
        about = artifacts[artifact]
        files = about.get("files") if isinstance(about, dict) else None
        for name, digest in files.items() if isinstance(files, dict) else ():
            if is_inside(name):
                found[below + name] = digest if isinstance(digest, str) else None
    return found


def _folder(exporter: str) -> str:
    try:
        return str(registry.find("exporters", exporter).DIRECTORY)
    except (PruneExportError, ImportError):  # of a plug-in that is no longer there
        return exporter


def _sums(folder: Path, names: Mapping[str, Any]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for line in _text(folder / SUMS).splitlines():
        digest, _, name = line.removeprefix("\\").partition("  ")
        if line.startswith("\\"):
            name = name.replace("\\n", "\n").replace("\\\\", "\\")
        if name in names:
            found[name] = digest
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")


def _json(file: Path) -> Any:
    try:
        return json.loads(_text(file) or "null")
    except (ValueError, RecursionError):
        return None


def _text(file: Path) -> str:
    """Reads a list; nothing where it is no regular file, too large, or not text."""
    try:
        descriptor = os.open(file, os.O_RDONLY | _QUIETLY)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LIST_BYTES:
                return ""
            return stream.read(_LIST_BYTES).decode()
    except (OSError, ValueError):
        return ""
