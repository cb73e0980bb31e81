"""Opens files from outside safely: regular ones only, and none too long for its kind.

A name in a model directory or a recipe may be a FIFO (opening it waits for ever), a device
(`/dev/zero` has no end) or a directory. Every reader of outside data opens its files here.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from prune_export.errors import CheckpointError, PruneExportError
from prune_export.system import platforms

JSON_BYTES: Final = 100_000_000
"""config.json, an index, a tokenizer's settings, a manifest: what is parsed as a whole."""
TOKENIZER_BYTES: Final = 1_000_000_000
"""tokenizer.json, vocabularies; the longest of 2026 have 40 MB."""
CARD_BYTES: Final = 10_000_000
"""README.md, LICENSE and other text for people."""
REPORT_BYTES: Final = 1_000_000_000
"""report.json and verify.json, which hold every sample."""

DEEPEST: Final = 64
"""How deep JSON from outside may be nested; configs of transformers reach 5."""

_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_WITHOUT_WAITING: Final = platforms.open_flags("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY")
_KINDS: Final = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(
    path: Path | str,
    limit_bytes: int | None = None,
    what: str = "a file",
    *,
    error: type[PruneExportError] = CheckpointError,
) -> BufferedReader:
    """Opens `path` for reading; never blocks, whatever is there.

    `limit_bytes` bounds the file's length, None leaves it open (data that is read in pieces).
    `what` names what is expected there, for the message: "a model card".

    Raises:
        PruneExportError: of the type `error`: not a regular file, too long, or unreadable.
    """
    where = shown(path)
    try:
        # Looked at before it is opened: opening some devices does something.
        _refuse_unfit(where, os.stat(path), limit_bytes, what, error)
        descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    except (OSError, ValueError) as problem:
        raise _unreadable(where, problem, what, error) from None
    try:
        _refuse_unfit(where, os.fstat(descriptor), limit_bytes, what, error)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(
    path: Path | str,
    limit_bytes: int,
    what: str = "a file",
    *,
    error: type[PruneExportError] = CheckpointError,
) -> bytes:
    """Reads a regular file of at most `limit_bytes`.

    Raises:
        PruneExportError: of the type `error`, as `open_regular`.
    """
    where = shown(path)
    with open_regular(path, limit_bytes, what, error=error) as stream:
        try:
            # One byte more than allowed: files of /proc, and those that grow, have no true length.
            found = stream.read(limit_bytes + 1)
        except OSError as problem:
            raise _unreadable(where, problem, what, error) from None
    if found is None:
        raise error(where, f"has nothing to read yet, expected {what}", "give a regular file")
    if len(found) > limit_bytes:
        raise _too_long(where, len(found), limit_bytes, what, error)
    return found


def read_regular_text(
    path: Path | str,
    limit_bytes: int,
    what: str = "a file",
    *,
    error: type[PruneExportError] = CheckpointError,
) -> str:
    """Reads a regular UTF-8 file.

    Raises:
        PruneExportError: of the type `error`, as `open_regular`; also what is not UTF-8.
    """
    found = read_regular(path, limit_bytes, what, error=error)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            shown(path),
            f"is not UTF-8 (byte {problem.start}), expected {what}",
            "write the file again as UTF-8",
        ) from None


def parse_json(
    text: str, where: str, *, error: type[PruneExportError] = CheckpointError
) -> dict[str, Any]:
    """Parses a JSON object: not nested deeper than `DEEPEST`, every string plain Unicode.

    Raises:
        PruneExportError: of the type `error`; `where` is the file.
    """
    again = "fetch or write the file again"
    try:
        found = json.loads(text)
    except RecursionError:
        raise error(where, f"is nested deeper than {DEEPEST} levels", again) from None
    except ValueError as problem:
        raise error(where, f"is not JSON: {problem}", again) from None
    if not isinstance(found, dict):
        raise error(where, f"is a JSON {type(found).__name__}, expected an object", again)
    if text.count("[") + text.count("{") > DEEPEST and is_deeper(found, DEEPEST):
        raise error(where, f"is nested deeper than {DEEPEST} levels", again)
    if _SURROGATE.search(text) and _has_surrogates(found):
        raise error(where, "holds half of a surrogate pair, which is no character", again)
    return found


def read_json_object(
    path: Path | str,
    what: str = "a JSON file",
    limit_bytes: int = JSON_BYTES,
    *,
    error: type[PruneExportError] = CheckpointError,
) -> dict[str, Any]:
    """Reads a JSON object from a regular file.

    Raises:
        PruneExportError: of the type `error`, as `read_regular_text` and `parse_json`.
    """
    text = read_regular_text(path, limit_bytes, what, error=error)
    return parse_json(text, shown(path), error=error)


def is_deeper(data: Any, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level: list[Any] = [data] if isinstance(data, Mapping | list | tuple) else []
    for _ in range(depth):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return False
    return True


def _has_surrogates(data: Any) -> bool:
    """Whether a string cannot be written as UTF-8; `data` is known not to be deep."""
    if isinstance(data, str):
        return any("\ud800" <= letter <= "\udfff" for letter in data)
    if isinstance(data, dict):
        return any(_has_surrogates(part) for pair in data.items() for part in pair)
    return isinstance(data, list) and any(map(_has_surrogates, data))


def is_regular(path: Path | str) -> bool:
    """Whether a regular file stands at `path` (links followed); False where it cannot be asked."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def shown(path: Path | str) -> str:
    """Formats a path for an error: one line, shortened in the middle where it is very long."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}…{text[-140:]}"


def _refuse_unfit(
    where: str,
    about: os.stat_result,
    limit_bytes: int | None,
    what: str,
    error: type[PruneExportError],
) -> None:
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for matches, name in _KINDS if matches(about.st_mode)), "no file")
        raise error(
            where,
            f"is {kind}, expected {what} (a regular file)",
            "put the file itself at this place",
        )
    if limit_bytes is not None and about.st_size > limit_bytes:
        raise _too_long(where, about.st_size, limit_bytes, what, error)


def _unreadable(
    where: str, problem: OSError | ValueError, what: str, error: type[PruneExportError]
) -> PruneExportError:
    if isinstance(problem, FileNotFoundError):
        return error(where, f"is missing, expected {what}", "check the path")
    reason = problem.strerror if isinstance(problem, OSError) else str(problem)
    return error(where, f"cannot be read: {reason}", "check the path and its permissions")


def _too_long(
    where: str, size: int, limit: int, what: str, error: type[PruneExportError]
) -> PruneExportError:
    return error(
        where,
        f"has {size:,} bytes, expected at most {limit:,} for {what}",
        "check that it is the right file",
    )
