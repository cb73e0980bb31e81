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


FLOOR: Final = -9999.0
"""What is told of a token that cannot come: JSON has no minus infinity."""


class Cancelled(Exception):
    """Nobody waits for the answer any more."""


class Generator:
    """An opened engine that answers one prompt after the other; `close` frees it."""

    def __init__(self, runner: Runner, ends: Sequence[int], longest: int | None) -> None:
        self._runner = runner.__enter__()
        self.ends = frozenset(ends)
        self.longest = longest
        # An engine may give the last position's logits alone; then a prompt that is to be
        # scored is fed token by token.
        logits, _ = runner.step(np.zeros((1, 2), np.int64))
        self._gives_all = logits.shape[1] == 2
        runner.reset()

    def close(self) -> None:
        """Frees the engine."""
        self._runner.__exit__(None, None, None)

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
        seed = sampling.seed
        random = np.random.default_rng(None if seed is None else seed % 2**64)
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
    """Chooses a token: the likeliest at temperature 0, else from the `top_p` nucleus.

    Raises:
        ArithmeticError: the engine gave no numbers.
    """
    likeliest = int(logits.argmax())
    _check(logits[likeliest])
    if sampling.temperature == 0:
        return likeliest
    with np.errstate(over="ignore", under="ignore"):
        scaled = (logits.astype(np.float64) - logits[likeliest]) / sampling.temperature
        weights = np.exp(scaled)
    if sampling.top_p < 1:
        order, total = _nucleus(weights, sampling.top_p)
        return int(order[_draw(total, random)])
    return _draw(np.cumsum(weights), random)


def _nucleus(weights: np.ndarray, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The smallest set whose probability reaches `top_p`, one token at least; the likeliest first.

    Gives its tokens and the running sums of their weights. Of a long vocabulary only as much is
    sorted as is needed.
    """
    whole, most = float(weights.sum()), 256
    while True:
        if most < len(weights):
            least = np.partition(weights, -most)[-most]
            places = np.flatnonzero(weights >= least)
        else:
            places = np.arange(len(weights))
        order = places[np.argsort(-weights[places], kind="stable")]
        total = np.cumsum(weights[order])
        keep = int(np.searchsorted(total, top_p * whole)) + 1
        if keep <= len(order) or len(order) == len(weights):
            return order[:keep], total[:keep]
        most *= 16


def _check(highest: float) -> None:
    if not np.isfinite(highest):
        raise ArithmeticError("the engine gave no numbers: its logits are not finite")


def scores(logits: np.ndarray, token: int, most: int) -> Chosen:
    """The log probability of a token, and the `most` likeliest; temperature does not count."""
    wide = logits.astype(np.float64)
    top = wide.max()
    _check(top)
    total = top + np.log(np.exp(wide - top).sum())
    best: tuple[tuple[int, float], ...] = ()
    if most:
        places = np.argpartition(-wide, min(most, len(wide)) - 1)[:most]
        ordered = sorted(places, key=lambda place: (-wide[place], place))
        best = tuple((int(place), _told(wide[place] - total)) for place in ordered)
    return Chosen(token, _told(wide[token] - total), best)


def _told(logprob: float) -> float:
    return max(float(logprob), FLOOR)


def _draw(cumulative: np.ndarray, random: np.random.Generator) -> int:
    place = int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
    return min(place, len(cumulative) - 1)
