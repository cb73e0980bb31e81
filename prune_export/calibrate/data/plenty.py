"""Tells by counting characters that text is plentiful, so that a plan need not tokenise it.

A plan asks of each data source whether it has enough windows. Where a text has twice as many
characters as its windows could need, the answer is known without a tokenizer, which costs more to
import than all else that a plan does. Whatever is less clear is left to `refuse_short`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prune_export.calibrate.data.conversations import Conversation
from prune_export.calibrate.data.documents import hash_of
from prune_export.calibrate.data.files import local_files
from prune_export.calibrate.data.parting import local_texts
from prune_export.calibrate.data.tokenizer import largest_id
from prune_export.recipe.sources import LocalText

READ: Final = 4_000_000
"""Characters of a source that are read at most to see whether it has enough: a few seconds."""

LONG_TOKEN: Final = 5
"""Characters that tokens of prose, code and numbers stay below on average."""

_MARGIN: Final = 2
_LONG_PREFIX: Final = 8


@dataclass(frozen=True)
class Wanted:
    """A source and the number of its windows; what `judges` shares no document with the others."""

    source: LocalText
    windows: int
    judges: bool


def is_plenty(wanted: Sequence[Wanted], tokenizer: Path, root: Path, vocabulary: int) -> bool:
    """Whether all sources surely have enough text, and no text has a token that the model lacks.

    Documents of a source that judges are counted for no other. False says nothing: the text may
    suffice all the same. `vocabulary` is how many ids the model knows, `tokenizer` a directory.

    Raises:
        PlanError: a file cannot be read or is not text.
    """
    if any(one.source.length <= _LONG_PREFIX for one in wanted):
        return False
    last = largest_id(tokenizer)
    if last is None or last >= vocabulary:
        return False
    taken: set[str] = set()
    for one in wanted:
        found = _documents(one.source, root)
        if found is None:
            return False
        left = {hash_: size for hash_, size in found.items() if hash_ not in taken}
        if not _suffice(left, one):
            return False
        if one.judges:
            taken |= found.keys()
    return True


def _documents(source: LocalText, root: Path) -> dict[str, int] | None:
    """Characters of each document by its hash; None for conversations, which need a template.

    Reading stops after `READ` characters.
    """
    if source.loss_on != "all":
        return None
    found: dict[str, int] = {}
    read = 0
    for text in local_texts(local_files(source, root), source):
        if isinstance(text, Conversation):
            return None
        if text.strip():
            found[hash_of(text)] = len(text)
        read += len(text)
        if read >= READ:
            break
    return found


def _suffice(found: dict[str, int], one: Wanted) -> bool:
    """Whether documents of these sizes hold the windows, by a wide margin."""
    characters = _MARGIN * LONG_TOKEN * one.source.length
    if one.source.packing == "windows":
        return sum(size >= characters for size in found.values()) >= one.windows
    return sum(found.values()) >= one.windows * characters
