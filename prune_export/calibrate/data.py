"""Token sets from what a recipe's `data` section says."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from prune_export.calibrate import packing
from prune_export.calibrate.documents import (
    hash_of,
    hub_revision,
    hub_texts,
    inside,
    local_files,
    local_texts,
)
from prune_export.calibrate.packing import Document, Ids, Windows
from prune_export.calibrate.tokens import TokenSet
from prune_export.errors import PlanError
from prune_export.progress import Progress, Silent, SilentTask, Task
from prune_export.recipe.sources import HubDataset, LocalText, Source, TokenFile

POOL: Final = 10_000
"""Local text is read up to this many windows, or as many as are wanted; then some are drawn."""

VOCABULARIES: Final = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "tekken.json", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of which a tokenizer has one at least, and which say what ids a text has."""

READ: Final = 4_000_000
"""Characters of a source that are read at most to see whether it has enough: a few seconds."""

_LONG_TOKEN: Final = 5
"""Characters that tokens of prose, code and numbers stay below on average."""

_FURTHER: Final = 8
"""How many times as much is read where that was not enough: documents are short, or left out."""

_BATCH_CHARACTERS: Final = 1_000_000


def token_set(
    source: Source,
    tokenizer: Path,
    root: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    progress: Progress | None = None,
) -> TokenSet:
    """The windows that a source describes; the same files and seed give the same set.

    `tokenizer` is a directory that holds one, `root` what relative paths start from. Documents
    whose hash is in `exclude` are left out: so text for healing never overlaps the evaluation's.

    Raises:
        PlanError: a path leaves `root`, text is missing or too short, or the Hub is unreachable.
        MissingExtra: the source needs an optional package.
    """
    if isinstance(source, TokenFile):
        return _saved(source, root, exclude)
    with (progress or Silent()).task("Tokenising") as task:
        return _tokenised(source, tokenizer, root, exclude, task)


def refuse_short(
    source: LocalText | TokenFile,
    tokenizer: Path,
    root: Path,
    *,
    exclude: frozenset[str] = frozenset(),
    documents: bool = False,
    least: int = 1,
) -> frozenset[str]:
    """Refuses text or tokens that hold too few windows, reading no more than it takes to see.

    Where the source leaves their number open, `least` must be there. What `READ` characters do not
    show passes. Returns hashes of documents that the set is sure to use, where `documents` asks for
    them; it may use others too.

    Raises:
        PlanError: as `token_set` does.
    """
    if isinstance(source, TokenFile):
        return frozenset(_saved(source, root, exclude, least).documents)
    found = Tokenizer.load(tokenizer)
    _refuse_no_room(source, found)
    files = local_files(source, root)
    needed = source.samples or least
    pool = None if source.samples is None else max(needed, POOL)
    read_all = documents and not (source.packing == "stream" and source.samples)
    most = READ if read_all else min(READ, _LONG_TOKEN * needed * source.length)
    if needed * source.length > READ and _is_long(local_texts(files, source.column)):
        return frozenset()
    while True:
        reader = _Reader(local_texts(files, source.column), exclude, SilentTask())
        first = _First(most)
        texts = first.of(reader.kept(empty=source.packing == "stream"))
        made = _windows(source, texts, found, pool if documents else needed)
        if len(made.ids) >= needed:
            sure = first.whole or source.packing == "stream"
            return frozenset(made.documents) if documents and sure else frozenset()
        if first.whole:
            _refuse_few(source, made, reader, least)
        if most == READ:
            return frozenset()
        most = min(READ, _FURTHER * most)


def _tokenised(
    source: HubDataset | LocalText,
    directory: Path,
    root: Path,
    exclude: frozenset[str],
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
        texts = local_texts(files, source.column)
        pool = None if pool is None else max(pool, POOL)
    reader = _Reader(texts, exclude, task)
    # Empty lines count in a stream: WikiText's protocol joins them too.
    kept = reader.kept(empty=how == "stream")
    found = _windows(source, kept, tokenizer, pool)
    _refuse_few(source, found, reader)
    origin |= {"documents_read": reader.read, "documents_excluded": reader.excluded}
    origin["windows_available"] = found.available
    documents = tuple(hash_ for hash_ in found.documents if hash_ != hash_of(""))
    return TokenSet.of(torch.from_numpy(found.ids.astype(np.int64)), documents, origin)


def _refuse_no_room(source: HubDataset | LocalText, tokenizer: Tokenizer) -> None:
    if source.length <= len(tokenizer.prefix):
        raise PlanError("data  length", f"got {source.length}, too short for a window", "raise it")


def _refuse_few(
    source: HubDataset | LocalText, found: Windows, reader: _Reader, least: int = 1
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
    texts: Iterator[tuple[str, str]],
    tokenizer: Tokenizer,
    pool: int | None,
) -> Windows:
    if source.packing == "stream":
        return packing.stream(texts, tokenizer.text, length=source.length, samples=source.samples)
    documents = tokenizer.documents(texts)
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
        pool=pool,
        seed=source.seed,
        prefix=tokenizer.prefix,
        separator=tokenizer.separator,
    )


@dataclass
class _Reader:
    """Counts documents while it hands them on."""

    texts: Iterable[str]
    exclude: frozenset[str]
    task: Task
    read: int = field(default=0, init=False)
    excluded: int = field(default=0, init=False)

    def kept(self, *, empty: bool) -> Iterator[tuple[str, str]]:
        """(hash, text) of each document that is not excluded; `empty` keeps empty ones."""
        for text in self.texts:
            if not text.strip():
                if empty:
                    yield hash_of(""), text
                continue
            self.read += 1
            self.task.advance()
            name = hash_of(text)
            if name in self.exclude:
                self.excluded += 1
            else:
                yield name, text


@dataclass
class _First:
    """The first `left` characters of texts, the last text cut; `whole` says that it was them all.

    A text that is cut keeps its hash.
    """

    left: int
    whole: bool = field(default=True, init=False)

    def of(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for name, text in texts:
            self.whole = len(text) <= self.left
            if self.whole or self.left:
                yield name, text[: self.left]
            if not self.whole:
                return
            self.left -= len(text)


def _is_long(texts: Iterable[str]) -> bool:
    """Whether texts have more than `READ` characters."""
    first = _First(READ)
    deque(first.of(("", text) for text in texts), maxlen=0)
    return not first.whole


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer: `prefix` is what it puts before any text, `separator` its end of text.

    `hash` tells two tokenizers apart: a sha256 of its vocabulary and rules.
    """

    backend: Any
    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    hash: str

    @staticmethod
    def lies_in(directory: Path) -> bool:
        """Whether a directory holds a tokenizer of any kind."""
        return any((directory / name).is_file() for name in VOCABULARIES)

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """The tokenizer of a model directory; no code from it is run.

        Raises:
            PlanError: there is none, or transformers cannot read it.
        """
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            # tokenizers raises bare Exception on a broken file; AutoTokenizer many kinds.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PlanError(
                f"{directory}  tokenizer",
                f"cannot be read: {reason:.300}",
                "copy tokenizer.json and tokenizer_config.json of the model into its directory",
            ) from error
        return Tokenizer(
            backend,
            _prefix(backend),
            () if backend.eos_token_id is None else (int(backend.eos_token_id),),
            _tokenizer_hash(directory),
        )

    def text(self, text: str) -> Ids:
        """One text's ids, with what the tokenizer adds to any text in front."""
        plain = self.backend(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray([*self.prefix, *plain], np.int32)

    def documents(self, texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
        """Each text's ids, nothing added, tokenised in batches."""
        for batch in _batches(texts):
            encoded = self.backend(
                [text for _, text in batch], add_special_tokens=False, verbose=False
            )["input_ids"]
            for (name, _), ids in zip(batch, encoded, strict=True):
                yield Document(name, np.asarray(ids, np.int32))


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for item in texts:
        batch.append(item)
        characters += len(item[1])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _prefix(backend: Any) -> tuple[int, ...]:
    plain = backend("a", add_special_tokens=False)["input_ids"]
    full = backend("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(int(id_) for id_ in full[:start])
    return ()


def _tokenizer_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in VOCABULARIES:
        if (directory / name).is_file():
            digest.update(name.encode() + b"\0" + bytes.fromhex(_sha256(directory / name)))
    return digest.hexdigest()


def _saved(source: TokenFile, root: Path, exclude: frozenset[str], least: int = 1) -> TokenSet:
    where = f"data tokens  {source.tokens}"
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
    if (samples, source.length) == (found.samples, found.length):
        return found
    return TokenSet.of(
        found.ids[:samples, : source.length],
        found.documents,
        {"cut_from": found.fingerprint, "samples": samples, "length": source.length}
        | {"origin": dict(found.provenance)},
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _named(source: HubDataset | LocalText) -> str:
    return source.dataset if isinstance(source, HubDataset) else ", ".join(source.files)
