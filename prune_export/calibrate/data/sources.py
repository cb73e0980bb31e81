"""Makes the token sets that a recipe's `data` section describes."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from prune_export.calibrate.data import decoding, packing
from prune_export.calibrate.data.conversations import Conversation
from prune_export.calibrate.data.documents import (
    Text,
    hash_of,
    hub_revision,
    hub_texts,
)
from prune_export.calibrate.data.files import inside, local_files
from prune_export.calibrate.data.packing import Windows
from prune_export.calibrate.data.parting import local_texts
from prune_export.calibrate.data.plenty import LONG_TOKEN, READ
from prune_export.calibrate.data.reading import First, Reader
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.data.tokenizer import Tokenizer, refuse_unknown_tokens
from prune_export.errors import PlanError
from prune_export.progress import Progress, Silent, SilentTask, Task
from prune_export.recipe.sources import HubDataset, LocalText, TextSource, TokenFile
from prune_export.system.files import shown

POOL: Final = 10_000
"""Local text is read up to this many windows, or as many as are wanted; then some are drawn."""

_FURTHER: Final = 8
"""How many times as much is read where that was not enough: documents are short, or left out."""


def token_set(
    source: TextSource,
    tokenizer: Path,
    root: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    vocabulary: int | None = None,
    progress: Progress | None = None,
) -> TokenSet:
    """Makes the windows of tokens that a data source describes; same files and seed, same windows.

    `tokenizer` is a directory that holds one, `root` what relative paths start from. Documents
    whose hash is in `exclude` are left out: so text for healing never overlaps the evaluation's.
    `vocabulary` is how many ids the model knows.

    Raises:
        PlanError: a path leaves `root`, text is missing, too short or no text, the Hub is
            unreachable, or a token is none of the model's.
        MissingExtra: the source needs an optional package.
    """
    if isinstance(source, TokenFile):
        return _saved(source, root, exclude, vocabulary)
    with (progress or Silent()).task("Tokenising") as task:
        return _tokenised(source, tokenizer, root, exclude, vocabulary, task)


def refuse_short(
    source: LocalText | TokenFile,
    tokenizer: Path,
    root: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    documents: bool = False,
    least: int = 1,
    vocabulary: int | None = None,
) -> frozenset[str]:
    """Refuses a source with too few tokens for its windows, and reads no more than that takes.

    Where the source leaves their number open, `least` must be there. What `READ` characters do not
    show passes. Returns hashes of documents that the set is sure to use, where `documents` asks for
    them; it may use others too.

    Raises:
        PlanError: as `token_set` does.
    """
    if isinstance(source, TokenFile):
        return frozenset(_saved(source, root, exclude, vocabulary, least).documents)
    found = Tokenizer.load(tokenizer)
    _refuse_no_room(source, found)
    files = _seen(source, root)
    needed = source.samples or least
    pool = None if source.samples is None else max(needed, POOL)
    read_all = documents and not (source.packing == "stream" and source.samples)
    most = READ if read_all else min(READ, LONG_TOKEN * needed * source.length)
    if needed * source.length > READ and _is_long(local_texts(files, source)):
        return frozenset()
    while True:
        reader = Reader(local_texts(files, source), exclude, SilentTask())
        first = First(most)
        texts = first.of(reader.kept(empty=source.packing == "stream"))
        made = _windows(source, texts, found, pool if documents else needed)
        refuse_unknown_tokens(found.backend, made.ids, vocabulary, f"data  {_named(source)}")
        if len(made.ids) >= needed:
            sure = first.whole or source.packing == "stream"
            return frozenset(made.documents) if documents and sure else frozenset()
        if first.whole:
            _refuse_few(source, made, reader, least)
        if most == READ:
            return frozenset()
        most = min(READ, _FURTHER * most)


def refuse_unreadable(source: LocalText, root: Path) -> None:
    """Refuses local files that are missing or no text, before there is a tokenizer.

    Raises:
        PlanError: as `token_set` does, of the beginning of each file and the first document.
    """
    next(local_texts(_seen(source, root), source), None)


def changed_since_first(source: TextSource, tokenizer: Path, root: Path) -> bool:
    """Whether the first version of this package made other tokens from this source.

    That had a byte order mark in the text, and no prefix but in the first window of a stream.
    """
    if isinstance(source, TokenFile):
        return False
    if source.packing == "stream" and source.prefix == "every" and Tokenizer.load(tokenizer).prefix:
        return True
    return isinstance(source, LocalText) and any(
        decoding.marked(file)
        for file in local_files(source, root)
        if file.name.endswith((".txt", ".txt.gz"))
    )


def _seen(source: LocalText, root: Path) -> list[Path]:
    """Finds the files of a source, and refuses those that are not text in its encoding."""
    files = local_files(source, root)
    for file in files:
        if not file.name.endswith(".parquet"):
            decoding.refuse_no_text(file, source.encoding)
    return files


def _tokenised(
    source: HubDataset | LocalText,
    directory: Path,
    root: Path,
    exclude: frozenset[str],
    vocabulary: int | None,
    task: Task,
) -> TokenSet:
    how = source.packing or "packed"
    tokenizer = Tokenizer.load(directory)
    _refuse_no_room(source, tokenizer)
    origin: dict[str, Any] = {
        "packing": how,
        "length": source.length,
        "samples": source.samples,
        "seed": source.seed,
        "column": source.column,
        "tokenizer": tokenizer.hash,
    }
    pool = source.samples
    if isinstance(source, HubDataset):
        revision = hub_revision(source)
        origin |= {
            "dataset": source.dataset,
            "config": source.config,
            "split": source.split,
            "revision": revision,
        }
        texts = hub_texts(source, revision, shuffle=how != "stream")
    else:
        files = local_files(source, root)
        origin["files"] = {str(file.relative_to(root)): _sha256(file) for file in files}
        texts = local_texts(files, source)
        pool = None if pool is None else max(pool, POOL)
    reader = Reader(texts, exclude, task)
    # Empty lines count in a stream: WikiText's protocol joins them too.
    kept = reader.kept(empty=how == "stream")
    found = _windows(source, kept, tokenizer, pool)
    _refuse_few(source, found, reader)
    refuse_unknown_tokens(tokenizer.backend, found.ids, vocabulary, f"data  {_named(source)}")
    origin |= {"documents_read": reader.read, "documents_excluded": reader.excluded}
    origin["windows_available"] = found.available
    origin |= _protocol(source, tokenizer, conversations=reader.conversations)
    documents = tuple(hash_ for hash_ in found.documents if hash_ != hash_of(""))
    counted = None if found.counted is None else torch.from_numpy(found.counted)
    return TokenSet.of(torch.from_numpy(found.ids.astype(np.int64)), documents, origin, counted)


def _protocol(
    source: HubDataset | LocalText, tokenizer: Tokenizer, *, conversations: bool
) -> dict[str, Any]:
    """What a token set's provenance says beyond the keys that every set has."""
    found: dict[str, Any] = {}
    if isinstance(source, LocalText) and source.encoding:
        found["encoding"] = source.encoding
    if isinstance(source, LocalText) and source.part:
        found["part"] = source.part.model_dump()
    if conversations:
        template = str(tokenizer.backend.get_chat_template())
        found["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        found["loss_on"] = source.loss_on
    elif source.packing == "stream" and tokenizer.prefix:
        found["prefix"] = f"{source.prefix} window"
    return found


def _refuse_no_room(source: HubDataset | LocalText, tokenizer: Tokenizer) -> None:
    if source.length <= len(tokenizer.prefix):
        raise PlanError("data  length", f"got {source.length}, too short for a window", "raise it")


def _refuse_few(
    source: HubDataset | LocalText, found: Windows, reader: Reader, least: int = 1
) -> None:
    if len(found.ids) < (source.samples or least):
        raise PlanError(
            f"data  {_named(source)}",
            f"holds {found.available} windows of {source.length} tokens in {reader.read} documents"
            f" ({reader.excluded} left out because another set uses them), "
            f"expected {source.samples or f'at least {least}'}",
            f"write `samples: {found.available}`, a smaller `length`, or add text"
            if found.available >= least
            else "write a smaller `length`, or add text",
        )


def _windows(
    source: HubDataset | LocalText,
    texts: Iterator[tuple[str, Text]],
    tokenizer: Tokenizer,
    pool: int | None,
) -> Windows:
    first = next(texts, None)
    given: Iterator[tuple[str, Any]] = texts if first is None else chain([first], texts)
    stream, talk = source.packing == "stream", first and isinstance(first[1], Conversation)
    if talk:
        only = source.loss_on == "assistant"
        documents = tokenizer.conversations(given, assistant_only=only)
    elif first and source.loss_on != "all":
        raise PlanError(
            f"data  {_named(source)}",
            f"holds text, and `loss_on: {source.loss_on}` is for conversations",
            "leave `loss_on` out, or give a column `messages`",
        )
    elif stream:
        return packing.stream(
            given,
            tokenizer.text,
            length=source.length,
            samples=source.samples,
            prefix=tokenizer.prefix,
            prefix_each=source.prefix == "every",
        )
    else:
        documents = tokenizer.documents(given)
    if source.packing == "windows":
        return packing.windows(
            documents,
            length=source.length,
            samples=source.samples,
            pool=pool,
            seed=source.seed,
            prefix=tokenizer.prefix,
        )
    return packing.packed(
        documents,
        length=source.length,
        samples=source.samples,
        pool=source.samples if stream else pool,
        seed=None if stream else source.seed,
        prefix=tokenizer.prefix,
        # A chat template says itself how a turn ends.
        separator=() if talk else tokenizer.separator,
    )


def _is_long(texts: Iterable[Text]) -> bool:
    """Whether texts have more than `READ` characters."""
    first = First(READ)
    deque(first.of(("", text) for text in texts), maxlen=0)
    return not first.whole


def _saved(
    source: TokenFile,
    root: Path,
    exclude: frozenset[str],
    vocabulary: int | None = None,
    least: int = 1,
) -> TokenSet:
    where = f"data tokens  {shown(source.tokens)}"
    found = TokenSet.load(inside(root, source.tokens, where)[0])
    shared = exclude.intersection(found.documents)
    if shared:
        raise PlanError(
            where,
            f"shares {len(shared)} documents with the evaluation data",
            "make the token file from other text",
        )
    samples = source.samples or max(found.samples, least)
    if found.samples < samples or found.length < source.length:
        raise PlanError(
            where,
            f"holds {found.samples} windows of {found.length} tokens, expected {samples} of "
            f"{source.length}",
            f"write `samples: {found.samples}` and `length: {found.length}`, or less"
            if found.samples >= least
            else "make the token file of more text",
        )
    last = int(found.ids.max()) if found.ids.numel() else -1
    if vocabulary is not None and last >= vocabulary:
        raise PlanError(
            where,
            f"holds token id {last}, but the model's embedding has only {vocabulary} rows",
            "make the tokens with this model's tokenizer, or resize the embedding",
        )
    if (samples, source.length) == (found.samples, found.length):
        return found
    counted = None if found.counted is None else found.counted[:samples, : source.length]
    if counted is not None and not bool(counted[:, 1:].any(dim=1).all()):
        raise PlanError(
            where,
            f"has windows in whose first {source.length} tokens the assistant says nothing",
            f"write `length: {found.length}`, or make the token file again with this length",
        )
    return TokenSet.of(
        found.ids[:samples, : source.length],
        found.documents,
        {"cut_from": found.fingerprint, "samples": samples, "length": source.length}
        | {"origin": dict(found.provenance)},
        counted,
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _named(source: HubDataset | LocalText) -> str:
    return source.dataset if isinstance(source, HubDataset) else ", ".join(source.files)
