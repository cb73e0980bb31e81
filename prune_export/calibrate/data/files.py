"""Finds the local files of a data source; refuses what is outside its root or unreadable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from prune_export.errors import PlanError
from prune_export.recipe.sources import LocalText
from prune_export.system.files import open_regular, shown

SUFFIXES: Final = (".txt", ".txt.gz", ".md", ".jsonl", ".jsonl.gz", ".json", ".parquet")
_OTHER_COMPRESSION: Final = (".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
_LONGEST_NAME_BYTES: Final = 255


def inside(root: Path, pattern: str, where: str) -> list[Path]:
    """Finds the files below `root` that a relative path or glob names, sorted.

    A path that is there is that file, whatever its name holds (`t [v1].txt`). What else a glob
    matches must be files; directories among them are passed over.

    Raises:
        PlanError: it leaves `root`, by itself or through a link, names nothing, or something that
            is no regular file or cannot be read.
    """
    named = shown(pattern)
    _refuse_impossible(pattern, named, where)
    try:
        literal = os.path.lexists(root / pattern)
        found = [root / pattern] if literal else sorted(root.glob(pattern))
    except (OSError, ValueError, NotImplementedError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = "check the path and the spelling"
        raise PlanError(where, f"`{named}` cannot be looked for: {reason}", fix) from None
    files = [path for path in found if _is_file(path, root, named, where)]
    if files:
        return files
    if found:
        what = "is a directory" if literal else "matches only directories"
        fix = f"name what is in it, for example `{named.rstrip('/')}/*.jsonl`"
        raise PlanError(where, f"`{named}` {what}, expected files", fix)
    raise PlanError(
        where,
        f"`{named}` names no file",
        "check the path and the spelling; a recipe's files are looked for below `--data-root`, and "
        "`--data FILE` puts text of your own in their place",
    )


def local_files(source: LocalText, root: Path) -> list[Path]:
    """Finds the files of a data source, each once, in the order of its patterns.

    Raises:
        PlanError: as `inside` does, or a file has another format.
    """
    found: dict[Path, None] = {}
    for pattern in source.files:
        found |= dict.fromkeys(inside(root, pattern, f"data files  {shown(pattern)}"))
    for path in found:
        where = f"data files  {path.name}"
        if not path.name.endswith(SUFFIXES):
            fix = 'convert it to JSON lines: one {"text": …} a line'
            if path.name.endswith(_OTHER_COMPRESSION):
                fix = "unpack it, or compress it with gzip"
            raise PlanError(
                where, f"has another format, expected one of {', '.join(SUFFIXES)}", fix
            )
        if source.encoding and path.name.endswith(".parquet"):
            raise PlanError(
                where,
                f"is Parquet, whose text is UTF-8, but `encoding` is {source.encoding}",
                "give the text files of that encoding a source of their own",
            )
    return list(found)


def _refuse_impossible(pattern: str, named: str, where: str) -> None:
    path = Path(pattern)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise PlanError(
            where,
            f"`{named}` leaves the data directory",
            "name a relative path below the data directory (`--data-root` moves it)",
        )
    if "\0" in pattern:
        raise PlanError(where, "holds a NUL character, which no name has", "correct the path")
    longest = max(len(part.encode("utf-8", "surrogateescape")) for part in path.parts)
    if longest > _LONGEST_NAME_BYTES:
        raise PlanError(
            where,
            f"has a name of {longest} bytes, and file systems take {_LONGEST_NAME_BYTES}",
            "check the path, or rename the file",
        )


def _is_file(path: Path, root: Path, named: str, where: str) -> bool:
    """Whether a path is a readable regular file (True) or a directory (False).

    Raises:
        PlanError: it is neither, cannot be read, or lies outside of `root`.
    """
    own = path.relative_to(root)
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise PlanError(
            where, f"{shown(own)} is a link to nothing", "mend the link, or remove it"
        ) from None
    except (OSError, RuntimeError) as error:
        reason = "is a link that leads in a circle"
        if isinstance(error, PermissionError):
            reason = f"cannot be read: {error.strerror}"
        raise PlanError(where, f"{shown(own)} {reason}", "mend it, or remove it") from None
    if not target.is_relative_to(root.resolve()):
        raise PlanError(
            where,
            f"`{named}` leaves the data directory: {shown(own)} is a link out of it",
            "name a relative path below the data directory (`--data-root` moves it)",
        )
    if target.is_dir():
        return False
    try:
        open_regular(path, None, "a file of text", error=PlanError).close()
    except PlanError as error:
        raise PlanError(where, f"{shown(own)} {error.problem}", error.fix) from None
    return True
