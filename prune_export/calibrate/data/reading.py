"""Filters documents before they are tokenised: counts them, excludes some, cuts after a length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prune_export.calibrate.data.conversations import Conversation
from prune_export.calibrate.data.documents import Text, hash_of
from prune_export.errors import PlanError
from prune_export.progress import Task


@dataclass
class Reader:
    """Passes documents on, without the excluded ones, and counts them."""

    texts: Iterable[Text]
    exclude: frozenset[str]
    task: Task
    read: int = field(default=0, init=False)
    excluded: int = field(default=0, init=False)
    conversations: bool = field(default=False, init=False)

    def kept(self, *, empty: bool) -> Iterator[tuple[str, Text]]:
        """Yields (hash, text) of each document that is not excluded; `empty` keeps empty ones.

        Raises:
            PlanError: some are text and others conversations.
        """
        for number, text in enumerate(self.texts):
            talk = isinstance(text, Conversation)
            if number and talk != self.conversations:
                raise PlanError(
                    text.where if isinstance(text, Conversation) else f"data  document {number}",
                    "is a conversation, and the ones before it are text" if talk
                    else "is text, and the ones before it are conversations",
                    "give each kind a source of its own",
                )  # fmt: skip
            self.conversations = talk
            if isinstance(text, str) and not text.strip():
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
class First:
    """Passes on the first `left` characters of all texts; `whole` says that there were no more.

    A text that is cut keeps its hash; a conversation is not cut.
    """

    left: int
    whole: bool = field(default=True, init=False)

    def of(self, texts: Iterable[tuple[str, Text]]) -> Iterator[tuple[str, Text]]:
        for name, text in texts:
            self.whole = len(text) <= self.left
            if self.whole or self.left:
                yield name, text if isinstance(text, Conversation) else text[: self.left]
            if not self.whole:
                return
            self.left -= len(text)
