"""Parses and formats bytes, counts and seconds."""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3

_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def bytes_from_text(text: str) -> int:
    """Parses a size in bytes: `24GiB`, `1.5 GB`, `800M` (decimal unless an `i` is written).

    Raises:
        ValueError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write for example `24GiB` or `800MB`")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()])


def text_from_bytes(count: float) -> str:
    """Formats bytes: `1.50 GiB` for 1610612736."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{int(count)} B"


def text_from_count(count: float) -> str:
    """Formats a count: `134.5M` for 134515008."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:g}"


def text_from_seconds(seconds: float) -> str:
    """Formats a time: `9 days`, `2 h 05 min`, `3 min 20 s`, `14 s` or `0.2 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole / 86400:,.0f} days"


def text_from_name(name: str) -> str:
    """Formats a file's name as UTF-8 text, with escapes for other bytes: to show, not to open."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
