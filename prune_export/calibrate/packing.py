"""Windows from tokenised documents, by the three conventions of the field.

    packed    documents joined by the end-of-text token, cut into windows, shuffled
    windows   one random window from each document that is longer than a window
    stream    documents joined by blank lines, tokenised as one text, windows in order

`windows` is what Wanda, SparseGPT and GBLM calibrate on (it favours long documents); `stream` is
the perplexity protocol. Windows of the first two begin with what the tokenizer puts before any
text (BOS, where it has one): models trained with it degrade without. A stream is tokenised once,
so only its first window does, as in published perplexities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """A tokenised document: the hash of its text, and its ids without special tokens."""

    hash: str
    ids: Ids


@dataclass(frozen=True)
class Windows:
    """`ids` int32 `[samples, length]`, the documents they use in order of first use, and how many
    windows there were to choose from.
    """

    ids: Ids
    documents: tuple[str, ...]
    available: int


def packed(
    documents: Iterable[Document],
    *,
    length: int,
    samples: int | None,
    pool: int | None,
    seed: int,
    prefix: Sequence[int] = (),
    separator: Sequence[int] = (),
) -> Windows:
    """Windows of concatenated documents, chosen at random.

    Reading stops when `pool` windows are full (None reads everything); `samples` of them are taken
    in an order that `seed` decides, all of them where `samples` is None.
    """
    body = length - len(prefix)
    hashes: list[str] = []
    parts: list[Ids] = []
    ends: list[int] = []
    total = 0
    for document in documents:
        parts.append(np.concatenate([document.ids, np.asarray(separator, np.int32)]))
        total += len(parts[-1])
        hashes.append(document.hash)
        ends.append(total)
        if pool is not None and total // body >= pool:
            break
    available = total // body
    flat = np.concatenate(parts) if parts else np.empty(0, np.int32)
    rows = flat[: available * body].reshape(available, body)
    order = np.random.default_rng(seed).permutation(available)[:samples]
    used: dict[str, None] = {}
    for row in order:
        first, last = np.searchsorted(ends, [row * body, (row + 1) * body - 1], side="right")
        used |= dict.fromkeys(hashes[first : last + 1])
    return Windows(_prefixed(rows[order], prefix), tuple(used), available)


def windows(
    documents: Iterable[Document],
    *,
    length: int,
    samples: int | None,
    pool: int | None,
    seed: int,
    prefix: Sequence[int] = (),
) -> Windows:
    """One random contiguous window from each document that is longer than a window.

    Reading stops at `pool` such documents; `samples` of them are taken at random. Source: the
    released code of Wanda (arXiv:2306.11695) and SparseGPT (arXiv:2301.00774).
    """
    body = length - len(prefix)
    random = np.random.default_rng(seed)
    hashes: list[str] = []
    rows: list[Ids] = []
    for document in documents:
        spare = len(document.ids) - body
        if spare <= 0:
            continue
        start = int(random.integers(0, spare + 1))
        rows.append(document.ids[start : start + body].copy())
        hashes.append(document.hash)
        if pool is not None and len(rows) >= pool:
            break
    order = random.permutation(len(rows))[:samples]
    chosen = np.stack([rows[row] for row in order]) if len(order) else np.empty((0, body), np.int32)
    used = dict.fromkeys(hashes[row] for row in order)
    return Windows(_prefixed(chosen, prefix), tuple(used), len(rows))


def stream(
    texts: Iterator[tuple[str, str]],
    tokenise: Callable[[str], Ids],
    *,
    length: int,
    samples: int | None,
) -> Windows:
    """Non-overlapping windows, in order, of all documents joined by blank lines.

    `texts` gives (hash, text); `tokenise` adds what the tokenizer adds to any text. With `samples`
    no more text is read than they need, and as much as gives the same windows as reading it all.
    """
    wanted = None if samples is None else samples * length
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
        ids = tokenise("\n\n".join(parts))
        # The end of the text may be tokenised otherwise once more text follows: stay clear of it.
        if wanted is not None and len(ids) >= wanted + 64:
            break
        goal = None if goal is None else 2 * goal
    available = len(ids) // length
    count = available if samples is None else min(samples, available)
    used = tuple(dict.fromkeys(hashes))
    return Windows(ids[: count * length].reshape(count, length), used, available)


def _prefixed(rows: Ids, prefix: Sequence[int]) -> Ids:
    first = np.tile(np.asarray(prefix, np.int32), (len(rows), 1))
    return np.ascontiguousarray(np.concatenate([first, rows], axis=1, dtype=np.int32))
