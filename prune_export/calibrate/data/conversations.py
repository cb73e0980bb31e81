"""Chat data: tokenises conversations by the tokenizer's chat template, and marks assistant tokens.

The template is the one in the tokenizer's own files. transformers renders it in jinja's sandbox;
no code of a model is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from prune_export.errors import PlanError
from prune_export.system.bounded import SECONDS, TookTooMuch, bounded

_MARKED: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""How a template marks what the assistant says; transformers looks for the same."""

_HALF_A_PAIR: Final = re.compile("[\ud800-\udfff]")

_SHAPE: Final = '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Conversation:
    """One conversation, a list of messages; `where` is its file and line, for errors."""

    messages: tuple[Mapping[str, Any], ...]
    where: str

    @property
    def hash(self) -> str:
        """The first 16 hex digits of the sha256 of its messages."""
        return hashlib.sha256(_as_json(self.messages).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Characters of what is said."""
        return sum(len(one["content"]) for one in self.messages)


def conversation_of(value: Sequence[Any], column: str, where: str) -> Conversation:
    """Reads the conversation that a row of a data set holds.

    Raises:
        PlanError: one of the messages has no role or no content that is text.
    """
    if not value:
        raise PlanError(where, f"has no message in `{column}`", "remove it, or give it messages")
    messages = []
    for number, one in enumerate(value):
        at = f"message {number} of `{column}`"
        if not isinstance(one, Mapping):
            raise PlanError(
                where, f"{at} is {kind_of(one)}, expected role and content", f"write {_SHAPE}"
            )
        for key in ("role", "content"):
            if not isinstance(one.get(key), str):
                got = kind_of(one[key]) if key in one else "missing"
                raise PlanError(
                    where, f"`{key}` of {at} is {got}, expected text", f"write {_SHAPE}"
                )
        # Parquet writes null where another message has a key that this one lacks.
        messages.append({str(key): part for key, part in one.items() if part is not None})
    try:
        refuse_half_pairs(_as_json(messages), where)
    except (RecursionError, TypeError, ValueError):
        raise PlanError(
            where, f"`{column}` holds more than messages of JSON can", f"write {_SHAPE}"
        ) from None
    return Conversation(tuple(messages), where)


def refuse_half_pairs(text: str, where: str) -> None:
    """Refuses text with half of a surrogate pair, which cannot be written as UTF-8.

    Raises:
        PlanError: it holds half of a surrogate pair, as JSON can say it.
    """
    if not text.isascii() and (half := _HALF_A_PAIR.search(text)):
        raise PlanError(
            where,
            f"holds \\u{ord(half[0]):04x}, half of a surrogate pair, which is no character",
            "write both halves, or remove it",
        )


def _as_json(messages: Sequence[Mapping[str, Any]]) -> str:
    # Parquet has dates and bytes, which no template needs but a message may carry.
    return json.dumps(list(messages), sort_keys=True, ensure_ascii=False, default=str)


def kind_of(value: Any) -> str:
    """Names the type of a JSON or Parquet value in plain words, for error messages."""
    if value is None:
        return "null"
    for types, name in (
        (bool, "true or false"),
        ((int, float), "a number"),
        (str, "text"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        (bytes, "bytes"),
    ):
        if isinstance(value, types):  # type: ignore[arg-type]
            return name
    return f"a {type(value).__name__}"


def encoded(
    backend: Any, conversation: Conversation, *, assistant_only: bool
) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
    """Tokenises a conversation: its ids with the template's special tokens, and which are counted.

    Raises:
        PlanError: there is no template, it refuses the messages, or it cannot tell who says what.
    """
    text, spans = _rendered(backend, conversation, assistant_only=assistant_only)
    if not assistant_only:
        found = backend(text, add_special_tokens=False, verbose=False)
        return np.asarray(found["input_ids"], np.int32), None
    return _marked(backend, text, spans)


def encoded_answer(
    backend: Any, conversation: Conversation, *, ended: bool
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokenises a conversation, of which only the last message counts, an assistant's.

    Where that was cut off (not `ended`), what the template closes it with does not count either.

    Raises:
        PlanError: as `encoded` does.
    """
    text, spans = _rendered(backend, conversation, assistant_only=True)
    start, stop = spans[-1]
    said = conversation.messages[-1]["content"].strip()
    if not ended and (at := text.rfind(said, start, stop)) >= 0:
        stop = at + len(said)
    return _marked(backend, text, [(start, stop)])


def _marked(backend: Any, text: str, spans: Spans) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokenises a text; tokens that begin in one of `spans` are marked."""
    found = backend(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    ids = np.asarray(found["input_ids"], np.int32)
    said = np.zeros(len(ids), np.bool_)
    offsets = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
    for start, stop in spans:
        said |= (offsets[:, 0] >= start) & (offsets[:, 0] < stop)
    return ids, said


def prompt_text(backend: Any, messages: Sequence[Mapping[str, Any]], where: str) -> str:
    """Renders messages by the chat template, up to where the assistant begins to answer.

    Raises:
        PlanError: there is no template, or it refuses them.
    """
    _template(backend, where)
    return _render(backend, [dict(one) for one in messages], where, prompt=True)


def refuse_untellable(backend: Any, where: str) -> None:
    """Refuses a tokenizer that cannot map tokens back to characters.

    Raises:
        PlanError: it is not one of the package `tokenizers`.
    """
    if not getattr(backend, "is_fast", False):
        raise PlanError(
            where,
            "this tokenizer does not say where in the text its tokens lie, which "
            "`loss_on: assistant` needs",
            "write `loss_on: all`, or give the model a tokenizer.json",
        )


def _rendered(
    backend: Any, conversation: Conversation, *, assistant_only: bool
) -> tuple[str, Spans]:
    template = _template(backend, conversation.where)
    messages = [dict(one) for one in conversation.messages]
    if not assistant_only:
        return _render(backend, messages, conversation.where), []
    if _MARKED.search(template):
        return _with_marks(backend, template, messages, conversation.where)
    return _by_prefixes(backend, messages, conversation.where)


def _template(backend: Any, where: str) -> str:
    if not backend.chat_template:
        raise PlanError(
            where,
            "holds messages, and the model's tokenizer has no chat template",
            "add one (`chat_template` in tokenizer_config.json, or chat_template.jinja), or write "
            "the conversations as text",
        )
    try:
        return str(backend.get_chat_template())
    except ValueError:
        names = ", ".join(f"`{name}`" for name in sorted(backend.chat_template))
        raise PlanError(
            where,
            f"holds messages, and of the tokenizer's chat templates ({names}) none is the default",
            "name one of them `default` in tokenizer_config.json",
        ) from None


def _render(backend: Any, messages: list[Any], where: str, *, prompt: bool = False) -> str:
    try:
        with bounded():
            return str(
                backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            )
    except Exception as error:
        # A template may raise what it likes; most say that roles must alternate.
        raise _refused(error, where) from error


def _with_marks(backend: Any, template: str, messages: list[Any], where: str) -> tuple[str, Spans]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with bounded():
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                return_assistant_tokens_mask=True,
                **backend.special_tokens_map,
            )
    except Exception as error:
        raise _refused(error, where) from error
    return str(texts[0]), [(int(start), int(stop)) for start, stop in spans[0]]


def _by_prefixes(backend: Any, messages: list[Any], where: str) -> tuple[str, Spans]:
    """Finds the assistant's characters by rendering the conversation up to each of its messages."""
    text = _render(backend, messages, where)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = number + 1 == len(messages)
        after = text if last else _render(backend, messages[: number + 1], where)
        before = ""
        if number:
            before = _render(backend, messages[:number], where, prompt=True)
        if not text.startswith(after) or not after.startswith(before):
            raise PlanError(
                where,
                "the chat template does not tell which tokens the assistant says: with fewer "
                "messages it writes another text, not a shorter one",
                "write `loss_on: all`, or mark them with {% generation %} in the template",
            )
        spans.append((len(before), len(after)))
    return text, spans


def _refused(error: Exception, where: str) -> PlanError:
    if isinstance(error, TookTooMuch):
        return PlanError(
            where,
            f"the chat template did not end within {SECONDS:g} s, or filled the memory",
            "use this model's own template, or write the conversations as text",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return PlanError(
        where,
        f"the chat template refuses these messages: {reason:.300}",
        "correct their roles and order, or remove them",
    )
