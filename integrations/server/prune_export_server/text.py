"""Turns tokens into text while they come: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_HALF: Final = "\ufffd"
"""What a decoder writes for bytes that are no whole character."""
_MOST_HELD: Final = 8
"""Tokens that wait for the rest of a character, at most: then what is surely broken is shown."""


class Detokenizer:
    """Decodes a growing list of tokens piece by piece; all pieces joined are the text.

    A tokenizer may write a token differently at the start of a text, so each piece is what a short
    tail of tokens gains by the new ones.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-6:])
        self._start, self._read = 0, len(self._tokens)
        self._before = self._decode(self._tokens)

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is not whole."""
        self._tokens.append(token)
        return self._next(last=False)

    def finish(self) -> str:
        """What is left, half characters included."""
        return self._next(last=True)

    def _next(self, *, last: bool) -> str:
        after, read = self._decode(self._tokens[self._start :]), len(self._tokens)
        if after.endswith(_HALF) and not last:
            if read - self._read <= _MOST_HELD:
                return ""
            after, read = self._broken(after)
        same = len(self._before)
        if not after.startswith(self._before):  # the prompt ended within a character
            same = _shared(self._before, after)
        piece = after[same:]
        if not piece and not last:
            return ""
        self._start, self._read = self._read, read
        self._before = self._decode(self._tokens[self._start : self._read])
        return piece

    def _broken(self, after: str) -> tuple[str, int]:
        """The text that no later token can change, and the place after its last token.

        A character has four bytes at most, so three tokens after it decide what a byte becomes.
        """
        for end in range(len(self._tokens) - 3, self._read, -1):
            text = self._decode(self._tokens[self._start : end])
            if after.startswith(text):
                return text, end
        return self._before, self._read

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


class Words:
    """The text of single tokens, as it stands within a text, and their bytes; each is kept.

    For one thread: it has a tokenizer of its own.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[int, tuple[str, list[int], int]] = {}

    def word(self, token: int) -> str:
        """The token's text; the name of a special one."""
        return self._of(token)[0]

    def bytes_of(self, token: int) -> list[int]:
        """The bytes of its text, also where they are no whole character."""
        return self._of(token)[1]

    def length(self, token: int) -> int:
        """How many characters of the text are its own: none of a special one's."""
        return self._of(token)[2]

    def decoded(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return decoded(self._tokenizer, tokens)

    def _of(self, token: int) -> tuple[str, list[int], int]:
        if token not in self._kept:
            # A tokenizer may leave out a space at the beginning of a text, but not a second time.
            once = self.decoded([token])
            text = self.decoded([token, token])[len(once) :]
            name = str(self._tokenizer.convert_ids_to_tokens(int(token)) or "")
            raw = _raw_bytes(name) if _HALF in text else None
            word = text or name
            self._kept[token] = word, list(word.encode()) if raw is None else raw, len(text)
        return self._kept[token]


def _shared(one: str, other: str) -> int:
    """How many characters at the beginning are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may begin `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def _raw_bytes(name: str) -> list[int] | None:
    """The bytes that a token of half a character stands for; None where its name does not say."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return [int(name[3:5], 16)]
    try:
        return [_BYTES[letter] for letter in name]
    except KeyError:
        return None


def _letters_of_bytes() -> dict[str, int]:
    """The byte of each letter in which byte-level tokenizers write their tokens.

    Printable bytes of Latin-1 are their own letters; the others are numbered from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES: Final = _letters_of_bytes()
