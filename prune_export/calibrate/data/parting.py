"""Splits one set of text into parts that never overlap: each reads a share of its documents.

Documents are put in an order that a seed decides, and a part takes those whose place in it, counted
in characters, lies in its share. A long text without documents is cut into contiguous spans first,
at blank lines where there are some, so that no part is of one place only and none is torn small.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

from prune_export.calibrate.data.conversations import Conversation
from prune_export.calibrate.data.documents import Text, hash_of, texts_of
from prune_export.recipe.sources import LocalText, Part

_SPANS: Final = 50
"""A document longer than this part of the whole text is cut into spans of that length."""

_SHORTEST_SPAN: Final = 500
"""Characters: about a hundred tokens."""

_BORDERS: Final = ("\n\n", "\n", ". ", " ")

Texts = Callable[[], Iterable[Text]]
"""Reads the documents from the beginning."""


def local_texts(files: Sequence[Path], source: LocalText) -> Iterator[Text]:
    """Yields the documents of a source's files: all of them, or those of its part.

    Raises:
        PlanError: a file cannot be read or is not text, or a line or row holds something else.
    """
    if source.part is None:
        return texts_of(files, source)
    return texts_of_part(lambda: texts_of(files, source), source.part)


def texts_of_part(texts: Texts, part: Part) -> Iterator[Text]:
    """Yields the documents of a part, in their order; what is longer than a span, as spans.

    `texts` is read three times, and only hashes and lengths are held.
    """
    longest = _longest(texts)
    order = _Order.of(_units(texts(), longest), part.seed)
    for unit in _units(texts(), longest):
        if part.start <= order.place(unit) < part.stop:
            yield unit


def part_sizes(texts: Texts, parts: Sequence[Part]) -> list[int]:
    """Counts the characters of each of several parts of one seed; blank documents count nothing."""
    longest = _longest(texts)
    order = _Order.of(_units(texts(), longest), parts[0].seed)
    sizes = [0] * len(parts)
    for unit in _units(texts(), longest):
        if isinstance(unit, str) and not unit.strip():
            continue
        place = order.place(unit)
        for number, part in enumerate(parts):
            sizes[number] += len(unit) if part.start <= place < part.stop else 0
    return sizes


def _longest(texts: Texts) -> int:
    return max(sum(len(text) for text in texts()) // _SPANS, _SHORTEST_SPAN)


def spans(text: str, longest: int) -> Iterator[str]:
    """Cuts a text into spans of at most `longest` characters, at blank lines if there are some.

    Joined, they are the text.
    """
    begin = 0
    while len(text) - begin > longest:
        end = begin + longest
        for border in _BORDERS:
            # Not in the first half: spans of one size make parts of the sizes asked for.
            at = text.rfind(border, begin + longest // 2, end)
            if at >= 0:
                end = at + len(border)
                break
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def _units(texts: Iterable[Text], longest: int) -> Iterator[Text]:
    for text in texts:
        if isinstance(text, Conversation):
            yield text
        else:
            yield from spans(text, longest)


@dataclass(frozen=True)
class _Order:
    """The order of units by a seeded hash: `keys` ascending, `before` the characters before each.

    Equal texts have one place, and so lie in one part.
    """

    seed: int
    keys: array[int]
    before: array[int]
    total: int

    @staticmethod
    def of(units: Iterable[Text], seed: int) -> _Order:
        sizes: dict[int, int] = {}
        for unit in units:
            key = _key(unit, seed)
            sizes[key] = sizes.get(key, 0) + len(unit)
        keys, before, total = array("Q", sorted(sizes)), array("Q"), 0
        for key in keys:
            before.append(total)
            total += sizes[key]
        return _Order(seed, keys, before, total)

    def place(self, unit: Text) -> float:
        """Where a unit begins in the order, from 0 to 1."""
        at = bisect_left(self.keys, _key(unit, self.seed))
        return self.before[at] / max(self.total, 1)


def _key(unit: Text, seed: int) -> int:
    digest = sha256(f"{seed}:{hash_of(unit)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
