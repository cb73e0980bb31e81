"""Generates from one engine: feeds a prompt, samples token by token, and gives log probabilities.

Everything here runs in the engine's thread. Works with any `prune_export.contracts.Runner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from prune_export.contracts import Runner

CHUNK: Final = 128
"""Prompt tokens in one step, so that logits of a long prompt need little memory."""


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `logprobs` is how many likeliest tokens to tell of each; None: none."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False


@dataclass(frozen=True)
class Chosen:
    """A token, its log probability (None where it was not asked for), and the likeliest ones."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Generator:
    """An opened engine that answers one prompt after the other."""

    def __init__(self, runner: Runner, ends: Sequence[int], longest: int | None) -> None:
        self._runner = runner
        self.ends = frozenset(ends)
        self.longest = longest
        # An engine may give the last position's logits alone; then a prompt that is to be
        # scored is fed token by token.
        logits, _ = runner.step(np.zeros((1, 2), np.int64))
        self._gives_all = logits.shape[1] == 2
        runner.reset()

    def prompt(
        self, ids: Sequence[int], sampling: Sampling, stopped: Callable[[], bool]
    ) -> tuple[list[Chosen], np.ndarray]:
        """Feeds a prompt; gives its tokens, scored if that is asked for, and the next logits.

        Raises:
            Cancelled: `stopped` said so between two steps.
        """
        self._runner.reset()
        scored = sampling.echo and sampling.logprobs is not None
        chunk = CHUNK if self._gives_all or not scored else 1
        found = [Chosen(ids[0])] if sampling.echo else []
        logits = np.empty(0, np.float32)
        for start in range(0, len(ids), chunk):
            if stopped():
                raise Cancelled
            part = np.asarray([ids[start : start + chunk]], np.int64)
            rows, _ = self._runner.step(part)
            logits = rows[0, -1]
            if scored:
                follow = ids[start + 1 : start + 1 + part.shape[1]]
                found += [
                    scores(row, token, sampling.logprobs or 0)
                    for row, token in zip(rows[0], follow, strict=False)
                ]
        if sampling.echo and not scored:
            found += [Chosen(token) for token in ids[1:]]
        return found, logits

    def continuation(
        self, logits: np.ndarray, sampling: Sampling, stopped: Callable[[], bool]
    ) -> Iterator[Chosen]:
        """Samples after the prompt; ends before an end token, or after `max_tokens`.

        Raises:
            Cancelled: `stopped` said so between two steps.
        """
        random = np.random.default_rng(sampling.seed)
        for number in range(sampling.max_tokens):
            if stopped():
                raise Cancelled
            token = sample(logits, sampling, random)
            if token in self.ends:
                return
            if sampling.logprobs is None:
                yield Chosen(token)
            else:
                yield scores(logits, token, sampling.logprobs)
            if number + 1 < sampling.max_tokens:
                rows, _ = self._runner.step(np.asarray([[token]], np.int64))
                logits = rows[0, -1]


def sample(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Chooses a token: the likeliest at temperature 0, else from the `top_p` nucleus."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        total = np.cumsum(weights[order])
        # The smallest set whose probability reaches top_p; one token at least.
        keep = int(np.searchsorted(total, sampling.top_p * total[-1])) + 1
        return int(order[_draw(total[:keep], random)])
    return _draw(np.cumsum(weights), random)


def scores(logits: np.ndarray, token: int, most: int) -> Chosen:
    """The log probability of a token, and the `most` likeliest; temperature does not count."""
    wide = logits.astype(np.float64)
    top = wide.max()
    total = top + np.log(np.exp(wide - top).sum())
    best: tuple[tuple[int, float], ...] = ()
    if most:
        places = np.argpartition(-wide, min(most, len(wide)) - 1)[:most]
        ordered = sorted(places, key=lambda place: (-wide[place], place))
        best = tuple((int(place), float(wide[place] - total)) for place in ordered)
    return Chosen(token, float(wide[token] - total), best)


def _draw(cumulative: np.ndarray, random: np.random.Generator) -> int:
    place = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return min(place, len(cumulative) - 1)
