"""The prompts that are answered: this package's own, a user's files, or none for free samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import Tokenizer, local_files
from prune_export.calibrate.data.conversations import prompt_text, refuse_half_pairs
from prune_export.calibrate.data.decoding import lines
from prune_export.calibrate.data.documents import Text, hash_of
from prune_export.calibrate.data.parting import local_texts
from prune_export.errors import PlanError
from prune_export.recipe import Generation, LocalText

_ASSISTANT: Final = "assistant"


@dataclass(frozen=True)
class Prompt:
    """One prompt, a text or messages; neither is a free sample. `document` is its text's hash."""

    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    document: str = ""

    def as_messages(self) -> list[dict[str, Any]]:
        """It as messages, a text as one of a user's."""
        if self.messages is not None:
            return [dict(one) for one in self.messages]
        return [{"role": "user", "content": self.text or ""}]


def prompts_of(
    generation: Generation, root: Path, exclude: frozenset[str] = frozenset()
) -> tuple[Prompt, ...]:
    """Reads the prompts, without those whose hash is in `exclude`; paths are below `root`.

    Of a text file each line is one.

    Raises:
        PlanError: a file cannot be read, there is no prompt, or one has nobody to answer.
    """
    if generation.prompts == "none":
        return (Prompt(),)
    if generation.prompts == "bundled":
        return tuple(Prompt(text) for text in bundled())
    source = _files(generation)
    found: dict[str, Prompt] = {}
    for text in _texts(source, root):
        if isinstance(text, str) and not text.strip():
            continue
        name = hash_of(text)
        if name not in exclude:
            found.setdefault(name, _prompt(text, name))
    if not found:
        raise PlanError(
            "data  generated.prompts",
            f"{', '.join(source.files)} hold no prompt that no other data use",
            "give one prompt a line, or `prompts: bundled`",
        )
    return tuple(found.values())


def prompt_files(generation: Generation, root: Path) -> list[Path]:
    """Lists the files that the prompts are read from.

    Raises:
        PlanError: as `local_files` has it.
    """
    if isinstance(generation.prompts, str):
        return []
    return local_files(_files(generation), root)


@lru_cache(maxsize=1)
def bundled() -> tuple[str, ...]:
    """This package's own prompts, written for it."""
    text = files("prune_export.generated").joinpath("prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def bundled_hash() -> str:
    """A hash of this package's own prompts, which a later version may change."""
    return hashlib.sha256("\n".join(bundled()).encode()).hexdigest()[:16]


def templated(generation: Generation, tokenizer: Tokenizer) -> bool:
    """Whether prompts are put as messages to a model that has this tokenizer."""
    if generation.template != "auto":
        return generation.template
    named = tokenizer.backend.chat_template
    return bool(named) and not (isinstance(named, dict) and "default" not in named)


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer, *, template: bool, where: str) -> list[int]:
    """Tokenizes a prompt; a free sample begins with what begins any text.

    Raises:
        PlanError: the tokenizer knows nothing that begins a text, or its template refuses it.
    """
    if prompt.messages is not None or (template and prompt.text is not None):
        text = prompt_text(tokenizer.backend, prompt.as_messages(), where)
        return [int(token) for token in tokenizer.text(text)]
    if prompt.text is not None:
        return [*tokenizer.prefix, *(int(token) for token in tokenizer.text(prompt.text))]
    if tokenizer.prefix:
        return list(tokenizer.prefix)
    for token in (tokenizer.backend.bos_token_id, *tokenizer.separator):
        if token is not None:
            return [int(token)]
    raise PlanError(
        where,
        "the tokenizer has no token that begins or ends a text, from which to draw free samples",
        "write `prompts: bundled`, or name files",
    )


def _files(generation: Generation) -> LocalText:
    assert not isinstance(generation.prompts, str)
    return LocalText(files=generation.prompts, column=generation.column)


def _texts(source: LocalText, root: Path) -> Iterator[Text]:
    for file in local_files(source, root):
        if not file.name.endswith((".txt", ".txt.gz")):
            yield from local_texts([file], source)
            continue
        for number, line in lines(file, None):
            refuse_half_pairs(line, f"data files  {file.name}:{number}")
            yield line.strip()


def _prompt(text: Text, name: str) -> Prompt:
    if isinstance(text, str):
        return Prompt(text, document=name)
    messages = list(text.messages)
    while messages and messages[-1]["role"] == _ASSISTANT:
        messages.pop()
    if not messages:
        raise PlanError(
            text.where, "holds only what an assistant says", "begin it with a user's message"
        )
    return Prompt(messages=tuple(dict(one) for one in messages), document=name)
