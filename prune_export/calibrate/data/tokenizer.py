"""A model's tokenizer, with what making token sets needs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from prune_export.calibrate.data.conversations import Conversation, encoded, refuse_untellable
from prune_export.calibrate.data.packing import Document, Ids
from prune_export.checkpoint.loading import load_tokenizer
from prune_export.checkpoint.side import side_files
from prune_export.errors import CheckpointError, PlanError
from prune_export.system.files import is_regular, read_json_object

VOCABULARIES: Final = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "tekken.json", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of which a tokenizer has one at least, and which say what ids a text has."""

_BATCH_CHARACTERS: Final = 1_000_000


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
        """Loads the tokenizer of a model directory; no code from it is run.

        Raises:
            PlanError: there is none, or transformers cannot read it.
        """
        try:
            backend = load_tokenizer(directory)
        except CheckpointError as error:
            raise PlanError(error.where, error.problem, error.fix) from error
        return Tokenizer(
            backend,
            _prefix(backend),
            () if backend.eos_token_id is None else (int(backend.eos_token_id),),
            _tokenizer_hash(directory),
        )

    def text(self, text: str) -> Ids:
        """Tokenises one text, without special tokens."""
        return np.asarray(
            self.backend(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32
        )

    def documents(self, texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
        """Tokenises texts in batches, without special tokens."""
        for batch in _batches(texts):
            found = self.backend(
                [text for _, text in batch], add_special_tokens=False, verbose=False
            )["input_ids"]
            for (name, _), ids in zip(batch, found, strict=True):
                yield Document(name, np.asarray(ids, np.int32))

    def conversations(
        self, given: Iterable[tuple[str, Conversation]], *, assistant_only: bool
    ) -> Iterator[Document]:
        """Tokenises conversations by the chat template, without the prefix that begins any window.

        Raises:
            PlanError: there is no template, or it refuses one of them.
        """
        if assistant_only:
            refuse_untellable(self.backend, "data  tokenizer")
        for name, one in given:
            ids, said = encoded(self.backend, one, assistant_only=assistant_only)
            if self.prefix and tuple(ids[: len(self.prefix)]) == self.prefix:
                ids = ids[len(self.prefix) :]
                said = None if said is None else said[len(self.prefix) :]
            yield Document(name, ids, said)


def largest_id(directory: Path) -> int | None:
    """Finds the largest id that a directory's tokenizer may give, without transformers.

    None where that is not plain to see: there is no tokenizer.json, or something stands beside it
    that adds tokens by other rules.

    Raises:
        CheckpointError: one of the files is no regular file, far too long, or no JSON.
    """
    from tokenizers import Tokenizer as Backend

    side_files(directory)
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not is_regular(file) or (directory / "added_tokens.json").exists():
        return None
    said = read_json_object(settings, "a tokenizer's settings") if is_regular(settings) else {}
    added = said.get("added_tokens_decoder") or {}
    if "auto_map" in said or not isinstance(added, dict):
        return None
    try:
        known = Backend.from_file(str(file)).get_vocab(with_added_tokens=True).values()
        return max((*known, *map(int, added)), default=None)
    except Exception:
        # tokenizers raises bare Exception on a broken file; who loads it says what is wrong.
        return None


def refuse_unknown_tokens(
    backend: Any, ids: np.ndarray, vocabulary: int | None, where: str
) -> None:
    """Refuses token ids beyond the `vocabulary` rows of a model's embedding.

    Raises:
        PlanError: there is one; a token was added, and the embedding was not resized.
    """
    last = int(ids.max()) if ids.size else -1
    if vocabulary is not None and last >= vocabulary:
        name = backend.convert_ids_to_tokens(last)
        raise PlanError(
            where,
            f"holds the token {name!r} with id {last}, but the model's embedding has only "
            f"{vocabulary} rows",
            "resize the embedding (`model.resize_token_embeddings(len(tokenizer))`) and save the "
            "model again, or take the added token out of the tokenizer",
        )


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
            with (directory / name).open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256")
            digest.update(name.encode() + b"\0" + content.digest())
    return digest.hexdigest()
