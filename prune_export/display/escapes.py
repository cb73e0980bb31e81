"""Escapes invisible and control characters in all that people read.

Texts come from recipes, models and file names; a terminal obeys some of their characters, and the
direction of writing that others change makes a name look like another, also on a page.
"""

from __future__ import annotations

import re
from typing import Final

_UNSEEN: Final = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f"  # C0 without the line feed, DEL, C1
    "\xad\u061c\u180e\u200b\u200e\u200f"  # soft hyphen, invisible blanks, marks of direction
    "\u2028-\u202e\u2060-\u206f"  # separators, embeddings, overrides, isolates
    "\ud800-\udfff\ufeff\ufff9-\ufffb"  # lone surrogates (bytes of a file name), BOM, annotations
    "\U000e0000-\U000e007f]"  # tags
)
_SHORT: Final = {"\t": "\\t", "\r": "\\r"}


def escaped(text: str) -> str:
    """Escapes every invisible or control character of a text."""
    return _UNSEEN.sub(_escape, text)


def json_escaped(text: str) -> str:
    """Escapes the same characters in JSON, as JSON's own escapes."""
    return _UNSEEN.sub(_json_escape, text)


def escaped_page(text: str) -> str:
    """Escapes a whole document, which may hold tabs."""
    return "\t".join(escaped(part) for part in text.split("\t"))


def _escape(match: re.Match[str]) -> str:
    one = match[0]
    code = ord(one)
    if one in _SHORT:
        return _SHORT[one]
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
