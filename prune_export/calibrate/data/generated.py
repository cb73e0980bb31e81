"""Answers that a model gave, in a file of one JSON object a line, and token windows of them.

Where the token ids are known (the model that spoke has the tokens of the one that learns), they are
taken as they were drawn. Else prompt and answer are tokenized as text, or by the chat template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from prune_export.calibrate.data import packing
from prune_export.calibrate.data.conversations import (
    Conversation,
    encoded_answer,
    refuse_untellable,
)
from prune_export.calibrate.data.packing import Document, Windows
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.data.tokenizer import Tokenizer, refuse_unknown_tokens
from prune_export.errors import CheckpointError, StageError
from prune_export.recipe.sources import Generated
from prune_export.system.files import open_regular

_LONGEST_LINE: Final = 64 * 1024**2


@dataclass(frozen=True)
class Sample:
    """One answer: the `draw`-th one to the `prompt`-th prompt, counted from 0.

    The prompt is `messages`, or `text`, or neither: a free sample. `ids` are the tokens of both, of
    which the first `given` are the prompt's; None where another tokenizer made them. `ended` says
    that the model stopped by itself. `document` is the hash of the text that the prompt is from,
    empty where that is nobody's. `about` is what a server said of it.
    """

    prompt: int
    draw: int
    answer: str
    ended: bool
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    ids: list[int] | None = None
    given: int = 0
    document: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """The hash by which it is left out of one set if another uses it."""
        if self.document:
            return self.document
        said = [self.messages, self.text, self.answer, self.ids]
        text = json.dumps(said, sort_keys=True, ensure_ascii=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to learn from."""
        return not self.answer.strip() if self.ids is None else len(self.ids) <= self.given

    def line(self) -> bytes:
        """It as a line of the file."""
        known = {name: value for name, value in asdict(self).items() if value not in (None, {}, "")}
        return json.dumps(known | {"answer": self.answer}, sort_keys=True).encode() + b"\n"


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a file of answers, in the order of prompts and draws."""
    ordered = sorted(samples, key=lambda one: (one.draw, one.prompt))
    path.write_bytes(b"".join(one.line() for one in ordered))


def read_samples(path: Path) -> list[Sample]:
    """Reads what `write_samples` wrote; a last line that is cut off is left out.

    Raises:
        CheckpointError: a line is no answer.
    """
    found, check = [], TypeAdapter(Sample)
    with open_regular(path, None, "a model's answers") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if not line.endswith(b"\n"):
                break
            try:
                found.append(check.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                raise CheckpointError(
                    f"{path}:{number}",
                    f"is no answer: {'.'.join(map(str, first['loc']))}: {first['msg']}",
                    "delete the file; answers are asked for again",
                ) from None
    return found


def documents_of(
    samples: Iterable[Sample], tokenizer: Tokenizer, *, exclude: frozenset[str] = frozenset()
) -> Iterator[Document]:
    """Tokenizes answers with their prompts; only what was answered counts in a loss.

    Empty ones and those of `exclude` are left out. Where an answer was cut off, what ends a text
    follows it so that the next is not read as its end; that does not count.

    Raises:
        PlanError: there is no chat template for messages, or it does not tell who says what.
    """
    for one in samples:
        if one.empty or one.hash in exclude:
            continue
        if one.ids is not None:
            ids = np.asarray(one.ids, np.int32)
            counted = np.arange(len(ids)) >= one.given
        elif one.messages is not None:
            ids, counted = _of_messages(one, tokenizer)
        else:
            ids, counted = _of_text(one, tokenizer)
        start = len(tokenizer.prefix)
        if tokenizer.prefix and tuple(ids[:start]) == tokenizer.prefix:
            ids, counted = ids[start:], counted[start:]
        if not one.ended and one.messages is None:
            ids = np.concatenate([ids, np.asarray(tokenizer.separator, np.int32)])
            counted = np.concatenate([counted, np.zeros(len(tokenizer.separator), np.bool_)])
        if counted.any():
            yield Document(one.hash, ids, counted)


def _of_messages(one: Sample, tokenizer: Tokenizer) -> tuple[packing.Ids, packing.Flags]:
    said = {"role": "assistant", "content": one.answer}
    where = f"generated data  answer {one.draw} to prompt {one.prompt}"
    talk = Conversation((*(one.messages or ()), said), where)
    refuse_untellable(tokenizer.backend, where)
    return encoded_answer(tokenizer.backend, talk, ended=one.ended)


def _of_text(one: Sample, tokenizer: Tokenizer) -> tuple[packing.Ids, packing.Flags]:
    prompt = tokenizer.text(one.text or "")
    answer = tokenizer.text(one.answer)
    ends = tokenizer.separator if one.ended else ()
    ids = np.concatenate([prompt, answer, np.asarray(ends, np.int32)])
    return ids, np.arange(len(ids)) >= len(prompt)


def windows_of_samples(
    source: Generated,
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    exclude: frozenset[str] = frozenset(),
) -> Windows:
    """Cuts answers into windows, as the keys of `source` say."""
    documents = documents_of(samples, tokenizer, exclude=exclude)
    if source.loss_on == "all":
        documents = (Document(one.hash, one.ids) for one in documents)
    if source.packing == "windows":
        return packing.windows(
            documents,
            length=source.length,
            samples=source.samples,
            pool=None,
            seed=source.seed,
            prefix=tokenizer.prefix,
        )
    return packing.packed(
        documents,
        length=source.length,
        samples=source.samples,
        pool=None,
        seed=None if source.packing == "stream" else source.seed,
        prefix=tokenizer.prefix,
    )


def tokens_of_samples(
    source: Generated,
    samples: Sequence[Sample],
    directory: Path,
    *,
    origin: Mapping[str, Any],
    exclude: frozenset[str] = frozenset(),
    vocabulary: int | None = None,
) -> TokenSet:
    """Makes the token windows of answers; `directory` holds the tokenizer, `origin` whose they are.

    Raises:
        StageError: there are too few of them.
        PlanError: as `documents_of`, or a token is none of the model's.
    """
    tokenizer = Tokenizer.load(directory)
    found = windows_of_samples(source, samples, tokenizer, exclude)
    wanted = source.samples or 1
    if len(found.ids) < wanted:
        empty = sum(one.empty for one in samples)
        raise StageError(
            "data  generated",
            f"{len(samples)} answers ({empty} of them empty) give {found.available} windows of "
            f"{source.length} tokens, expected {'at least ' * (not source.samples)}{wanted}",
            "write more `answers` or more `new_tokens`, fewer `samples`, or a smaller `length`",
        )
    refuse_unknown_tokens(tokenizer.backend, found.ids, vocabulary, "data  generated")
    known = dict(origin) | {
        "packing": source.packing or "packed",
        "length": source.length,
        "samples": source.samples,
        "seed": source.seed,
        "tokenizer": tokenizer.hash,
        "loss_on": source.loss_on,
        "windows_available": found.available,
    }
    counted = None if found.counted is None else torch.from_numpy(found.counted)
    ids = torch.from_numpy(found.ids.astype(np.int64))
    return TokenSet.of(ids, found.documents, known, counted)
