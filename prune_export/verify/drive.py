"""Drives an opened `Runner`: times it, computes losses of text, generates text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from prune_export.contracts import LimitsBatch, Runner
from prune_export.errors import VerifyError

if TYPE_CHECKING:  # the process that times an engine needs no torch
    from prune_export.sampling import Sampling

CHUNK: Final = 256
"""Tokens that are scored at once: bounds the logits' memory at 256 x vocabulary x 4 bytes."""


def time_once(runner: Runner, ids: np.ndarray, prompt: int) -> tuple[float, float]:
    """Measures seconds for the prompt, and mean seconds for a decode step.

    `ids` int64 `[batch, prompt + new]` are fed as they are, so that two models do the same work
    whatever they would have generated. One untimed step goes before, which brings weights and
    threads back after another process had the machine.
    """
    runner.reset()
    runner.step(ids[:, :1])
    runner.reset()
    _, prefill = runner.step(ids[:, :prompt])
    steps = [runner.step(ids[:, at : at + 1])[1] for at in range(prompt, ids.shape[1])]
    runner.reset()
    return prefill, sum(steps) / len(steps)


def window_losses(
    runner: Runner,
    ids: np.ndarray,
    advance: Callable[[int], None],
    *,
    counted: np.ndarray | None = None,
    batch: int = 16,
) -> list[float]:
    """Computes each window's mean cross-entropy in nats over its `length - 1` predictions.

    `ids` int64 `[windows, length]`; where `counted` bool of that shape is given, the mean is over
    the predictions of tokens that it marks. A window is fed in chunks through the cache, so that
    its logits are never in memory as a whole. An engine that returns only the last position's
    logits is fed token by token instead, `batch` windows at once or as many as it takes: slower,
    and its decode path is what is measured then.
    """
    if not len(ids):
        return []
    whole = _returns_all(runner, ids)
    step, rows = (CHUNK, 1) if whole else (1, _at_once(runner, batch))
    flags = None if counted is None else counted[:, 1:]  # of each prediction
    losses: list[float] = []
    for first in range(0, len(ids), rows):
        window = ids[first : first + rows]
        total = np.zeros(len(window))
        runner.reset()
        for start in range(0, window.shape[1] - 1, step):
            fed = window[:, start : min(start + step, window.shape[1] - 1)]
            logits, _ = runner.step(fed)
            predicted = slice(start, start + fed.shape[1])
            marks = None if flags is None else flags[first : first + rows, predicted]
            total += _losses(logits, window[:, 1:][:, predicted], marks)
        own = window.shape[1] - 1 if flags is None else flags[first : first + rows].sum(axis=1)
        losses += [float(loss) for loss in total / own]
        advance(len(window))
    runner.reset()
    return losses


def _at_once(runner: Runner, wanted: int) -> int:
    return min(wanted, runner.most_sequences) if isinstance(runner, LimitsBatch) else wanted


def _returns_all(runner: Runner, ids: np.ndarray) -> bool:
    runner.reset()
    logits, _ = runner.step(ids[:1, :2])
    return bool(logits.shape[1] == 2)


def _losses(logits: np.ndarray, targets: np.ndarray, marks: np.ndarray | None) -> np.ndarray:
    """Sums cross-entropy, float64 `[batch]`, of logits `[batch, new, vocab]`, where marked."""
    import torch  # engines that are only timed do without it

    flat = torch.from_numpy(logits).flatten(0, 1)
    wanted = torch.from_numpy(np.ascontiguousarray(targets)).flatten()
    loss = torch.nn.functional.cross_entropy(flat, wanted, reduction="none")
    each = loss.double().view(targets.shape)
    if marks is not None:
        each = each * torch.from_numpy(np.ascontiguousarray(marks))
    return each.sum(dim=1).numpy()


def cached_logits(runner: Runner, ids: np.ndarray, steps: int) -> np.ndarray:
    """Computes logits float32 `[windows, positions, vocab]`, the last `steps` tokens one by one.

    The first positions are those of the prompt that the engine returns: all, or the last. The
    windows go through it together, or as many at once as it takes.
    """
    prompt, rows = ids.shape[1] - steps, _at_once(runner, len(ids))
    windows = []
    for first in range(0, len(ids), rows):
        some = ids[first : first + rows]
        runner.reset()
        parts = [runner.step(some[:, :prompt])[0]]
        parts += [runner.step(some[:, at : at + 1])[0] for at in range(prompt, ids.shape[1])]
        windows.append(np.concatenate(parts, axis=1))
    runner.reset()
    return np.concatenate(windows)


def continuations(
    runner: Runner, prompts: Sequence[Sequence[int]], new: int, advance: Callable[[int], None]
) -> list[list[int]]:
    """Generates `new` greedy tokens after each prompt, in one batch and without padding.

    All rows advance together: the first step feeds as many tokens as the shortest prompt has; a
    row with prompt left is then fed from it, and the others from what they said. So no engine
    needs a padding mask, and twelve prompts cost little more than one.
    """
    if not prompts or not all(prompts):
        raise VerifyError(
            "generation", "got an empty prompt", "give each prompt at least one token"
        )
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    texts = [list(prompt) for prompt in prompts]
    runner.reset()
    logits, _ = runner.step(np.array([text[:shortest] for text in texts], dtype=np.int64))
    for position in range(shortest, longest + new):
        said = logits[:, -1].argmax(axis=-1)
        for row, text in enumerate(texts):
            if len(text) == position:
                text.append(int(said[row]))
        if position + 1 < longest + new:
            logits, _ = runner.step(np.array([[text[position]] for text in texts], dtype=np.int64))
            advance(1)
    runner.reset()
    return [
        text[len(prompt) : len(prompt) + new] for text, prompt in zip(texts, prompts, strict=True)
    ]


def drawn(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    new: int,
    advance: Callable[[int], None],
    *,
    how: Sampling,
    seeds: Sequence[int],
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Draws up to `new` tokens after each prompt, as many at once as the engine takes.

    A text ends with the first of `ends`, which is its last token then. Each has a seed of its own.
    """
    if not prompts or not all(prompts):
        raise VerifyError("sampling", "got an empty prompt", "give each prompt at least one token")
    rows, texts = _at_once(runner, len(prompts)), []
    for first in range(0, len(prompts), rows):
        part = slice(first, first + rows)
        texts += _drawn_together(runner, prompts[part], new, advance, how, seeds[part], ends)
    return texts


def _drawn_together(
    runner: Runner,
    prompts: Sequence[Sequence[int]],
    new: int,
    advance: Callable[[int], None],
    how: Sampling,
    seeds: Sequence[int],
    ends: Collection[int],
) -> list[list[int]]:
    """Draws texts in one batch without padding, as `continuations` has it."""
    import torch

    from prune_export.sampling import Dice, picked

    dice, texts = Dice(seeds), [list(prompt) for prompt in prompts]
    wanted = [len(prompt) + new for prompt in prompts]
    position = min(map(len, prompts))
    runner.reset()
    logits, _ = runner.step(np.array([text[:position] for text in texts], dtype=np.int64))
    while True:
        ready = [row for row, text in enumerate(texts) if len(text) == position < wanted[row]]
        if ready:
            own = torch.from_numpy(np.ascontiguousarray(logits[ready, -1]))
            for row, token in zip(ready, picked(own, dice.roll(ready), how).tolist(), strict=True):
                texts[row].append(token)
                if token in ends:
                    wanted[row] = len(texts[row])
        position += 1
        if all(position >= length for length in wanted):
            break
        # What has ended is fed its last token on, which nobody reads.
        fed = [[text[min(position, len(text)) - 1]] for text in texts]
        logits, _ = runner.step(np.array(fed, dtype=np.int64))
        advance(len(ready))
    runner.reset()
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


@dataclass(frozen=True)
class Teacher:
    """The reference model's greedy tokens, with its logits at each.

    `tokens` and `logits` are what it said after each step: `tokens[i]` is the largest of
    `logits[i]`, float32 `[new, vocab]`.
    """

    tokens: np.ndarray
    logits: np.ndarray


def greedy(runner: Runner, prompt: np.ndarray, new: int) -> Teacher:
    """Generates `new` greedy tokens after `prompt` int64 `[length]`, through the KV cache."""
    runner.reset()
    logits, _ = runner.step(prompt[None])
    rows = [logits[0, -1]]
    for _ in range(new - 1):
        token = np.array([[rows[-1].argmax()]], dtype=np.int64)
        rows.append(runner.step(token)[0][0, -1])
    runner.reset()
    stacked = np.stack(rows)
    return Teacher(stacked.argmax(axis=-1).astype(np.int64), stacked)


def tokens_without_text() -> np.ndarray:
    """Makes `[4, 256]` tokens that every vocabulary has, for measurements without text."""
    return np.random.default_rng(0).integers(0, 256, size=(4, 256), dtype=np.int64)
