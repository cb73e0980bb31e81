"""Makes the answers of a `generated` source: asks whoever speaks, and keeps what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import Sample, Tokenizer, windows_of_samples, write_samples
from prune_export.generated.journal import Journal
from prune_export.generated.local import Local, answer_locally
from prune_export.generated.prompts import Prompt
from prune_export.generated.server import TERMS, ask_server, count_of
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.recipe import Generated

ANSWERS: Final = "answers.jsonl"
"""The file of an artifact that holds them."""


@dataclass(frozen=True)
class Speaker:
    """Who answers: a `local` model or engine, None for a server; `name` may be published."""

    name: str
    local: Local | None


def generate(
    source: Generated,
    speaker: Speaker,
    prompts: Sequence[Prompt],
    learner: Path,
    out: Path,
    *,
    machine: Machine,
    scratch: Path,
    progress: Progress,
    exclude: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Writes answers into the directory `out`, and gives what is to be known of them.

    `learner` holds the tokenizer of the model that is to learn from them. Answers whose hash is in
    `exclude` do not count towards its windows. A run that is killed goes on from `scratch`.

    Raises:
        PlanError: a prompt cannot be put, or a server may not be asked.
        StageError: a server refuses, or fails again and again.
    """
    generation, journal = source.generated, Journal(scratch)
    if speaker.local is None:
        total: int | None = count_of(generation, prompts)
    else:
        total = None if generation.answers is None else generation.answers * generation.new_tokens
        wanted = (source.samples or 0) * source.length
        total = total or wanted
    with progress.task(f"{speaker.name} answers", total) as task:
        if speaker.local is None:
            ask_server(generation, prompts, journal, task)
        else:
            enough = _enough(source, learner, exclude)
            answer_locally(speaker.local, prompts, generation, machine, journal, enough, task)
    write_samples(out / ANSWERS, journal.samples)
    return _told(source, speaker, journal.samples)


def _enough(
    source: Generated, learner: Path, exclude: frozenset[str]
) -> Callable[[Sequence[Sample]], bool]:
    """Whether answers fill the windows that are asked for; with a number of answers never."""
    if source.generated.answers is not None:
        return lambda samples: False
    tokenizer, wanted = Tokenizer.load(learner), source.samples or 0
    least = wanted * (source.length - len(tokenizer.prefix))

    def enough(samples: Sequence[Sample]) -> bool:
        # Cutting them takes all of them: not before there can be enough.
        if source.packing != "windows" and all(one.ids is not None for one in samples):
            if sum(len(one.ids or ()) + 1 for one in samples) < least:
                return False
        elif len(samples) < wanted // source.length:
            return False
        return windows_of_samples(source, samples, tokenizer, exclude).available >= wanted

    return enough


def _told(source: Generated, speaker: Speaker, samples: Sequence[Sample]) -> dict[str, Any]:
    """What a report says of answers: who gave them, how many, and how they were drawn."""
    generation = source.generated
    told: dict[str, Any] = {
        "from": generation.speaker,
        "model": speaker.name,
        "prompts": generation.prompts
        if isinstance(generation.prompts, str)
        else list(generation.prompts),
        "answers": len(samples),
        "empty": sum(one.empty for one in samples),
        "cut_off": sum(not one.ended for one in samples),
        "temperature": generation.temperature,
        "top_p": generation.top_p,
        "seed": generation.seed,
    }
    if speaker.local is None:
        served: Mapping[str, int] = Counter(str(one.about.get("model")) for one in samples)
        days = sorted(str(one.about["day"]) for one in samples if "day" in one.about)
        told |= {
            "served": dict(sorted(served.items())),
            "days": [days[0], days[-1]] if days else [],
            "tokens": sum(int(one.about.get("tokens", 0)) for one in samples),
            "terms": TERMS,
        }
    return told
