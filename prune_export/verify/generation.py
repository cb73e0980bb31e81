"""Checks generated text: greedy continuations of built-in prompts, and their faults.

Perplexity averages over text that is given; a pruned model can do well there and still fall into a
loop as soon as it speaks itself. Small dense models loop as well, so the counts mean something only
beside those of the dense model.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from prune_export.checkpoint.loading import load_ends, load_tokenizer
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.system.bounded import SECONDS, TookTooMuch, bounded
from prune_export.verify.engine import Engine
from prune_export.verify.results import Generation
from prune_export.verify.session import Session

NEW_TOKENS: Final = 64
PROMPTS: Final = (
    "What is the capital of France, and which river runs through it?",
    "Explain in two sentences why the sky looks blue at noon.",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "List three things that a beginner should know before baking bread.",
    "How many minutes are there in a day? Show the calculation.",
    "Write a Python function that returns the largest number in a list.",
    "The old lighthouse keeper had not spoken to anyone for weeks, until one evening",
    "In 1969, for the first time in history, human beings",
    "The committee met on Tuesday to decide whether the new bridge",
    "Water boils at a lower temperature in the mountains because",
    "Translate into French: The train to the coast leaves at half past seven.",
    "Two farmers share a field. The first one plants potatoes, the second one",
)
_GRAM: Final = 4
_REPETITIVE: Final = 0.5
_LOOP_PERIOD: Final = 3
_LOOP_TOKENS: Final = 24


class EndlessTemplate(PlanError):
    """A chat template that does not come to an end."""


def measure_generation(
    name: str,
    engine: Engine,
    tokenizer: Path,
    machine: Machine,
    *,
    prompts: Sequence[str] = PROMPTS,
    new: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> Generation:
    """Generates `new` greedy tokens after each prompt, and counts faulty texts.

    `tokenizer` is a directory with the tokenizer; a prompt goes through its chat template where it
    has a default one. A text ends before the first end-of-sequence token.
    """
    spoken = load_tokenizer(tokenizer)
    fed, new = _fitting([_encoded(spoken, prompt) for prompt in prompts], new, engine.positions)
    steps = max(map(len, fed)) - min(map(len, fed)) + new - 1
    with (
        (progress or Silent()).task(f"generation of {name}", steps) as task,
        Session(engine, machine) as session,
    ):
        _refuse_unknown(spoken, fed, session.ready())
        said = session.continuations(fed, new, task)
    ends = {spoken.eos_token_id, *load_ends(tokenizer)}
    cut = [_until(tokens, ends) for tokens in said]
    texts = [str(spoken.decode(tokens, skip_special_tokens=True)) for tokens in cut]
    return judge(name, prompts, cut, texts)


def refuse_unknown_prompts(tokenizer: Path, vocabulary: int) -> None:
    """Refuses a tokenizer whose prompts hold a token that a model with `vocabulary` ids lacks.

    Raises:
        PlanError: a token was added, and the embedding not resized.
    """
    from prune_export.calibrate import Tokenizer, largest_id

    try:
        last = largest_id(tokenizer)
        if last is not None and last < vocabulary:
            return
        backend = Tokenizer.load(tokenizer).backend
        fed = [_encoded(backend, prompt) for prompt in PROMPTS]
    except EndlessTemplate:
        raise
    except Exception:
        # Not about ids: whatever is wrong with it, those who need it say so.
        return
    _refuse_unknown(backend, fed, vocabulary)


def _refuse_unknown(backend: Any, fed: Sequence[Sequence[int]], vocabulary: int) -> None:
    from prune_export.calibrate import refuse_unknown_tokens

    every = np.array([token for prompt in fed for token in prompt], np.int64)
    refuse_unknown_tokens(backend, every, vocabulary, "verify.generation  prompts")


def judge(
    name: str, prompts: Sequence[str], tokens: Sequence[Sequence[int]], texts: Sequence[str]
) -> Generation:
    """Counts faults; a text is counted once: as empty, else as broken, else as repetitive."""
    empty = [not text.strip() for text in texts]
    broken = [
        not nothing and is_broken(said, text)
        for nothing, said, text in zip(empty, tokens, texts, strict=True)
    ]
    repetitive = [
        not nothing and not worse and repeated_share(said) > _REPETITIVE
        for nothing, worse, said in zip(empty, broken, tokens, strict=True)
    ]
    return Generation(
        name=name,
        prompts=len(prompts),
        empty=sum(empty),
        repetitive=sum(repetitive),
        broken=sum(broken),
        examples=[
            {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
        ],
        distinct=[distinct_share(tokens, length) for length in (1, 2, 3)],
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Computes the share of token 4-grams that occurred before; 0 for fewer than 8 tokens."""
    grams = [tuple(tokens[at : at + _GRAM]) for at in range(len(tokens) - _GRAM + 1)]
    if len(tokens) < 2 * _GRAM:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


def distinct_share(texts: Sequence[Sequence[int]], length: int) -> float:
    """The share of different ones among all runs of `length` tokens of texts; 0 without any.

    Source: Li et al., A Diversity-Promoting Objective Function (1510.03055), section 5.3
    (distinct-1 and distinct-2).
    """
    runs = [tuple(one[at : at + length]) for one in texts for at in range(len(one) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def is_broken(tokens: Sequence[int], text: str) -> bool:
    """Whether a text is broken.

    That is: undecodable bytes (a character cut off by the end is none), control characters, or one
    to three tokens repeated from the start through 24 tokens.
    """
    if "\ufffd" in text.rstrip("\ufffd"):
        return True
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\n\r\t" for c in text):
        return True
    start = list(tokens[:_LOOP_TOKENS])
    return len(start) == _LOOP_TOKENS and any(
        start[period:] == start[:-period] for period in range(1, _LOOP_PERIOD + 1)
    )


def _fitting(
    prompts: list[list[int]], new: int, positions: int | None
) -> tuple[list[list[int]], int]:
    """Cuts prompts (to their ends) and new tokens to the positions that a model has."""
    if positions is not None:
        room = max(positions // 2, positions - new)
        prompts = [prompt[-room:] for prompt in prompts]
        new = min(new, positions - max(map(len, prompts), default=0))
    return prompts, new


def _encoded(tokenizer: Any, prompt: str) -> list[int]:
    """Tokenises a prompt, by the default chat template where there is one."""
    named = tokenizer.chat_template
    if not named or (isinstance(named, dict) and "default" not in named):
        return [int(token) for token in tokenizer(prompt)["input_ids"]]
    turns = [{"role": "user", "content": prompt}]
    try:
        with bounded():
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
    except TookTooMuch:
        raise EndlessTemplate(
            "verify.generation  prompts",
            f"the chat template did not end within {SECONDS:g} s, or filled the memory",
            "use this model's own template, or write `verify: {generation: false}`",
        ) from None
    return [int(token) for token in ids]


def _until(tokens: Sequence[int], ends: set[int | None]) -> list[int]:
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
