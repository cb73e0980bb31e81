"""Turns tokens into text while they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_HALF: Final = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""


class Detokenizer:
    """Decodes a growing list of tokens piece by piece; all pieces joined are the text.

    A tokenizer may write a token differently at the start of a text, so each piece is what a short
    tail of tokens gains by the new ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-6:])
        self._start, self._read = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        self._tokens.append(token)
        return self._next(last=False)

    def finish(self) -> str:
        """What is left, half characters included."""
        return self._next(last=True)

    def _next(self, *, last: bool) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if (after.endswith(_HALF) and not last) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return decoded(self._tokenizer, tokens)


class Stopper:
    """Holds back what may be the beginning of a stop string; `met` once one was found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.met = False

    def add(self, text: str) -> str:
        """The part of the text so far that is surely before any stop string."""
        if self.met:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.met = True
            found, self._held = self._held[: min(places)], ""
            return found
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        found, self._held = self._held[:cut], self._held[cut:]
        return found

    def finish(self) -> str:
        """What was held back and was no stop string after all."""
        found, self._held = self._held, ""
        return found


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones."""
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
