"""Answers in OpenAI's form: whole ones, and the chunks of streamed ones."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prune_export_server.generation import Chosen
from prune_export_server.text import Words


@dataclass
class Form:
    """How the answers of one request look: whose they are, and of which kind."""

    model: str
    words: Words
    chat: bool
    logprobs: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """A whole answer."""
        return self._head("") | {"choices": list(choices), "usage": usage}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """A piece of a streamed answer."""
        found = self._head(".chunk" if self.chat else "") | {"choices": list(choices)}
        return found if usage is None else found | {"usage": usage}

    def choice(
        self, index: int, text: str, tokens: Sequence[Chosen], finish: str | None, offset: int = 0
    ) -> dict[str, Any]:
        """One choice of a whole answer."""
        found: dict[str, Any] = {"index": index, "finish_reason": finish}
        if self.chat:
            found["message"] = {"role": "assistant", "content": text}
        else:
            found["text"] = text
        return found | {"logprobs": self._logprobs(tokens, offset)}

    def delta(
        self,
        index: int,
        text: str,
        tokens: Sequence[Chosen],
        finish: str | None,
        *,
        first: bool,
        offset: int,
    ) -> dict[str, Any]:
        """One choice of a streamed piece."""
        found: dict[str, Any] = {"index": index, "finish_reason": finish}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            found["delta"] = role | ({"content": text} if text or first else {})
        else:
            found["text"] = text
        return found | {"logprobs": self._logprobs(tokens, offset)}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[Chosen], offset: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._entry(one) for one in tokens], "refusal": None}
        places = []
        for one in tokens:
            places.append(offset)
            offset += self.words.length(one.token)
        return {
            "tokens": [self.words.word(one.token) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [self._likeliest(one) for one in tokens],
            "text_offset": places,
        }

    def _entry(self, one: Chosen) -> dict[str, Any]:
        return self._said(one.token, one.logprob) | {
            "top_logprobs": [self._said(token, value) for token, value in one.likeliest]
        }

    def _said(self, token: int, logprob: float | None) -> dict[str, Any]:
        word, raw = self.words.word(token), self.words.bytes_of(token)
        return {"token": word, "logprob": logprob, "bytes": raw}

    def _likeliest(self, one: Chosen) -> dict[str, float] | None:
        """By its text; the token itself is always there, and of equal texts the likeliest."""
        if one.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, value in (*one.likeliest, (one.token, one.logprob)):
            found.setdefault(self.words.word(token), value)
        return found


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    """The counts of tokens of an answer."""
    return {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
    }  # fmt: skip
