"""Cuts tokenised documents into windows of one length, by the three conventions of the field.

    packed    documents joined by the end-of-text token, cut into windows, shuffled
    windows   one random window from each document that is longer than a window
    stream    documents joined by blank lines, tokenised as one text, windows in order

`windows` is what Wanda, SparseGPT and GBLM calibrate on (it favours long documents); `stream` is
the perplexity protocol. Windows of the first two begin with what the tokenizer puts before any
text (BOS, where it has one): models trained with it degrade without. Those of a stream do as well,
as lm-eval has it, unless `prefix_each` is off: then the text is cut as published perplexities cut
it, and only its first window does.

Conversations carry which of their tokens count in a loss; windows in which none does are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Document:
    """A tokenised document: the hash of its text, and its ids without what begins any text.

    `counted` says of each token whether it counts in a loss; None where all do.
    """

    hash: str
    ids: Ids
    counted: Flags | None = None


@dataclass(frozen=True)
class Windows:
    """`ids` int32 `[samples, length]`, the documents they use in order of first use, and how many
    windows there were to choose from. `counted` bool `[samples, length]`, None where all count.
    """

    ids: Ids
    documents: tuple[str, ...]
    available: int
    counted: Flags | None = None


def packed(
    documents: Iterable[Document],
    *,
    length: int,
    samples: int | None,
    pool: int | None,
    seed: int | None,
    prefix: Sequence[int] = (),
    separator: Sequence[int] = (),
) -> Windows:
    """Joins documents, cuts them into windows, and takes some of these at random.

    Reading stops when `pool` windows are full (None reads everything); `samples` of them are taken
    in an order that `seed` decides (None keeps theirs), all of them where `samples` is None.
    """
    body = length - len(prefix)
    joined = _Joined(body, bool(prefix), np.asarray(separator, np.int32))
    for document in documents:
        joined.add(document)
        if pool is not None and joined.reaches(pool):
            break
    ids, counted, places = joined.windows()
    order = (
        np.arange(len(ids)) if seed is None else np.random.default_rng(seed).permutation(len(ids))
    )
    order = order[:samples]
    used: dict[str, None] = {}
    for row in places[order]:
        used |= dict.fromkeys(joined.documents_of(int(row)))
    return Windows(
        _prefixed(ids[order], prefix),
        tuple(used),
        len(ids),
        None if counted is None else _flagged(counted[order], len(prefix)),
    )


@dataclass
class _Joined:
    """Concatenates documents and cuts them into windows of `body` tokens.

    `begun` says that something stands before each window, so that its first token is predicted.
    """

    body: int
    begun: bool
    separator: Ids
    hashes: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    parts: list[Ids] = field(default_factory=list)
    flags: list[Flags] = field(default_factory=list)
    goal: int = 0

    def add(self, document: Document) -> None:
        self.parts.append(np.concatenate([document.ids, self.separator]))
        if document.counted is not None:
            after = np.ones(len(self.separator), np.bool_)
            self.flags.append(np.concatenate([document.counted, after]))
        self.hashes.append(document.hash)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(self.parts[-1]))

    def reaches(self, pool: int) -> bool:
        """Whether there are `pool` windows that have a token whose loss counts."""
        full = self.ends[-1] // self.body
        if full < max(pool, self.goal):
            return False
        if not self.flags:
            return True
        # Counting takes all of them: look again only when a tenth more is there.
        self.goal = full + max(1, full // 10)
        return len(self.windows()[0]) >= pool

    def windows(self) -> tuple[Ids, Flags | None, NDArray[np.int64]]:
        """Ids `[windows, body]`, flags of the same shape, and where each lies among all."""
        available = (self.ends[-1] if self.ends else 0) // self.body
        flat = np.concatenate(self.parts) if self.parts else np.empty(0, np.int32)
        rows = flat[: available * self.body].reshape(available, self.body)
        if not self.flags:
            return rows, None, np.arange(available)
        flags = np.concatenate(self.flags)[: available * self.body].reshape(rows.shape)
        kept = np.flatnonzero(flags[:, 0 if self.begun else 1 :].any(axis=1))
        return rows[kept], flags[kept], kept

    def documents_of(self, row: int) -> list[str]:
        """The hashes of the documents in a window."""
        place = [row * self.body, (row + 1) * self.body - 1]
        first, last = np.searchsorted(self.ends, place, side="right")
        return self.hashes[first : last + 1]


def windows(
    documents: Iterable[Document],
    *,
    length: int,
    samples: int | None,
    pool: int | None,
    seed: int,
    prefix: Sequence[int] = (),
) -> Windows:
    """Takes one random contiguous window from each document that is longer than a window.

    Reading stops at `pool` such documents; `samples` of them are taken at random. Source: the
    released code of Wanda (arXiv:2306.11695) and SparseGPT (arXiv:2301.00774).
    """
    body = length - len(prefix)
    random = np.random.default_rng(seed)
    hashes: list[str] = []
    rows: list[Ids] = []
    flags: list[Flags] = []
    for document in documents:
        spare = len(document.ids) - body
        if spare <= 0:
            continue
        start = int(random.integers(0, spare + 1))
        if document.counted is not None:
            own = document.counted[start : start + body].copy()
            if not own[0 if prefix else 1 :].any():
                continue
            flags.append(own)
        rows.append(document.ids[start : start + body].copy())
        hashes.append(document.hash)
        if pool is not None and len(rows) >= pool:
            break
    order = random.permutation(len(rows))[:samples]
    chosen = np.stack([rows[row] for row in order]) if len(order) else np.empty((0, body), np.int32)
    used = dict.fromkeys(hashes[row] for row in order)
    counted = np.stack([flags[row] for row in order]) if flags and len(order) else None
    return Windows(
        _prefixed(chosen, prefix),
        tuple(used),
        len(rows),
        None if counted is None else _flagged(counted, len(prefix)),
    )


def stream(
    texts: Iterator[tuple[str, str]],
    tokenise: Callable[[str], Ids],
    *,
    length: int,
    samples: int | None,
    prefix: Sequence[int] = (),
    prefix_each: bool = True,
) -> Windows:
    """Joins all documents by blank lines and cuts them, in order, into non-overlapping windows.

    `texts` gives (hash, text); `tokenise` adds nothing to it. `prefix` begins each window, which
    keeps its length, or the whole text only. With `samples` no more text is read than they need,
    and as much as gives the same windows as reading it all.
    """
    each, once = (prefix, ()) if prefix_each else ((), prefix)
    body = length - len(each)
    wanted = None if samples is None else samples * body
    hashes: list[str] = []
    parts: list[str] = []
    characters = 0
    goal = None if wanted is None else 4 * wanted
    ids = np.empty(0, np.int32)
    more = True
    while more:
        more = False
        for hash_, text in texts:
            hashes.append(hash_)
            parts.append(text)
            characters += len(text) + 2
            if goal is not None and characters >= goal:
                more = True
                break
        ids = np.concatenate(
            [np.asarray(once, np.int32), tokenise("\n\n".join(parts))], dtype=np.int32
        )
        # The end of the text may be tokenised otherwise once more text follows: stay clear of it.
        if wanted is not None and len(ids) >= wanted + 64:
            break
        goal = None if goal is None else 2 * goal
    available = len(ids) // body
    count = available if samples is None else min(samples, available)
    used = tuple(dict.fromkeys(hashes))
    rows = _prefixed(ids[: count * body].reshape(count, body), each)
    counted = None
    if len(each) > 1:
        # What follows the first token of a longer prefix is no prediction to judge by.
        counted = _flagged(np.ones((count, body), np.bool_), len(each))
    return Windows(rows, used, available, counted)


def _prefixed(rows: Ids, prefix: Sequence[int]) -> Ids:
    first = np.tile(np.asarray(prefix, np.int32), (len(rows), 1))
    return np.ascontiguousarray(np.concatenate([first, rows], axis=1, dtype=np.int32))


def _flagged(counted: Flags, prefix: int) -> Flags:
    first = np.zeros((len(counted), prefix), np.bool_)
    return np.concatenate([first, counted], axis=1)
