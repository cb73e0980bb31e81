"""Reads text files: decompresses and decodes them, and names the place of what cannot be read.

A file in another encoding than its source says is never read as best it may: replacement
characters would be calibrated, healed and judged on without a word.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Final

from prune_export.errors import PlanError
from prune_export.system.files import open_regular

LONGEST_DOCUMENT_BYTES: Final = 256 * 1024**2
"""No honest document is longer; a file that is would otherwise fill the memory."""

_CHUNK: Final = 1 << 16
_MARK_BYTES: Final = 4
_FIRST_PIECES: Final = 4
_MARKS: Final = (
    # The mark of UTF-16 begins that of UTF-32, so the longer ones come first.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def whole(path: Path, encoding: str | None) -> str:
    """Reads a whole file as one document.

    Raises:
        PlanError: it cannot be read, is not text in `encoding` (None: UTF-8), or is too long.
    """
    pieces: list[str] = []
    size = 0
    for piece in _decoded(path, encoding):
        pieces.append(piece)
        size += len(piece)
        _refuse_long(size, path)
    return "".join(pieces)


def lines(path: Path, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Yields the lines of a file with their numbers, from 1.

    Raises:
        PlanError: as `whole` does.
    """
    number, size = 1, 0
    held: list[str] = []
    for piece in _decoded(path, encoding):
        first, *others = piece.split("\n")
        held.append(first)
        for other in others:
            yield number, "".join(held)
            number, size, held = number + 1, 0, [other]
        size += len(held[-1])
        _refuse_long(size, path)
    if any(held):
        yield number, "".join(held)


def refuse_no_text(path: Path, encoding: str | None) -> None:
    """Refuses a file whose beginning is not text in `encoding`.

    Raises:
        PlanError: as `whole` does, of the first pieces.
    """
    deque(islice(_decoded(path, encoding), _FIRST_PIECES), maxlen=0)


def marked(path: Path) -> bool:
    """Whether a text file begins with the byte order mark of UTF-8, which is not part of its text.

    Raises:
        PlanError: it cannot be read.
    """
    with open_regular(path, None, "a file of text", error=PlanError) as file:
        try:
            return _unpacked(file, path).read(3) == codecs.BOM_UTF8
        except (OSError, EOFError, zlib.error) as error:
            raise _unsound(path, 1, error) from None


def _decoded(path: Path, encoding: str | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")("strict")
    offset, line, begun = 0, 1, False
    with open_regular(path, None, "a file of text", error=PlanError) as file:
        stream = _unpacked(file, path)
        while True:
            try:
                # What can still be had of a broken file tells the line at which it breaks.
                chunk = stream.read1(_CHUNK) if begun else stream.read(_MARK_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                raise _unsound(path, line, error) from None
            if not begun:
                _refuse_mark(chunk, path, encoding)
            if encoding is None and b"\0" in chunk:
                # Looked for first: UTF-16 may also be wrong as UTF-8.
                raise _binary(path, encoding, line + chunk[: chunk.index(b"\0")].count(b"\n"))
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeError as error:
                raise _undecodable(path, encoding, error, offset + len(chunk), line) from None
            if "\0" in text:
                raise _binary(path, encoding, line + text[: text.index("\0")].count("\n"))
            offset += len(chunk)
            line += text.count("\n")
            if not begun:
                # The mark is four bytes at most, and whole in the first piece.
                begun, text = True, text.removeprefix("\ufeff")
            if text:
                yield text
            if not chunk:
                return


def _unpacked(file: BinaryIO, path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    assert isinstance(file, io.BufferedIOBase)
    return file


def _refuse_mark(chunk: bytes, path: Path, encoding: str | None) -> None:
    found = next((name for mark, name in _MARKS if chunk.startswith(mark)), None)
    asked = codecs.lookup(encoding or "utf-8").name
    if found is None or asked.startswith(found):
        return
    fix = f"write `encoding: {found}` in the source, or convert the file to UTF-8"
    if encoding and found == "utf-8":
        fix = "leave `encoding` out: the file is UTF-8"
    raise PlanError(
        f"data files  {path.name}",
        f"begins with the mark (BOM) of {found.upper()}, expected {_told(encoding)}",
        fix,
    )


def _undecodable(
    path: Path, encoding: str | None, error: UnicodeError, read: int, line: int
) -> PlanError:
    problem = f"is not {_told(encoding)}"
    if isinstance(error, UnicodeDecodeError):
        # The decoder may hold bytes of earlier chunks; what it has seen ends where was read to.
        at = read - len(error.object) + error.start
        before = error.object[: error.start].decode(encoding or "utf-8", "replace")
        line += before.count("\n")
        problem += f": byte {error.object[error.start]:#04x} at offset {at}"
    else:
        problem += f": {error}"
    fix = (
        "name the encoding that it has in the source, such as `encoding: cp1252`, or convert it to "
        "UTF-8; what is no text cannot be used"
    )
    return PlanError(f"data files  {path.name}:{line}", problem, fix)


def _binary(path: Path, encoding: str | None, line: int) -> PlanError:
    return PlanError(
        f"data files  {path.name}:{line}",
        f"holds a NUL character, expected text in {_told(encoding)}",
        "if it is UTF-16 or UTF-32 without a mark, write `encoding: utf-16-le` (or -be, or utf-32-…"
        ") in the source; what is no text cannot be used",
    )


def _unsound(path: Path, line: int, error: Exception) -> PlanError:
    where = f"data files  {path.name}:{line}"
    if isinstance(error, EOFError):
        return PlanError(
            where,
            "ends before its compressed data do: the file is cut off",
            "fetch or compress it again",
        )
    if isinstance(error, gzip.BadGzipFile | zlib.error):
        return PlanError(
            where,
            f"is not sound gzip: {error}",
            "fetch or compress it again; a file that is not compressed has no `.gz` in its name",
        )
    reason = getattr(error, "strerror", None) or str(error)
    return PlanError(where, f"cannot be read: {reason}", "check the file and its permissions")


def _refuse_long(size: int, path: Path) -> None:
    if size > LONGEST_DOCUMENT_BYTES:
        raise PlanError(
            f"data files  {path.name}",
            f"holds a document of more than {LONGEST_DOCUMENT_BYTES} bytes",
            "split it into documents, one a line of a .jsonl",
        )


def _told(encoding: str | None) -> str:
    return encoding or "UTF-8"
