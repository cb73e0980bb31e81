"""What answers cost, and what `plan` says of them; refuses what cannot be asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from prune_export.arch import Arch
from prune_export.calibrate import Tokenizer, native_dtype
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Cost
from prune_export.errors import PlanError
from prune_export.generated.local import ROWS, dense, feed, local_at
from prune_export.generated.prompts import Prompt, prompts_of
from prune_export.generated.server import TERMS, count_of, refuse_unasked
from prune_export.machine import Machine
from prune_export.recipe import DENSE, Generated, Generation
from prune_export.sampling import READ_BYTES_A_SECOND, STEP_SECONDS
from prune_export.system.files import shown
from prune_export.units import MIB

_PROCESS_BYTES: Final = 700 * MIB
_SERVER_SECONDS: Final = 5.0
_PROMPT_TOKENS: Final = 32


@dataclass(frozen=True)
class Talk:
    """A source's answers as `plan` has them: their cost, and a note; `arch` is who speaks."""

    name: str
    arch: Arch
    cost: Cost
    note: str


def talk_of(source: Generated, model: Checkpoint, arch: Arch, root: Path, machine: Machine) -> Talk:
    """Plans the answers of a source; `model` is what the recipe starts from, of shapes `arch`.

    Raises:
        PlanError: a server may not be asked, a prompt cannot be put or is too long, or there cannot
            be as many tokens as the windows take.
    """
    generation = source.generated
    prompts = prompts_of(generation, root)
    if generation.is_server:
        return _served(source, arch, prompts)
    speaking = arch
    if generation.speaker == DENSE:
        if Tokenizer.lies_in(model.path):
            feed(dense(model.path, machine), prompts, generation)
    else:
        place = speaker_at(generation, root)
        local = local_at(place, machine, learner=model.path)
        feed(local, prompts, generation)
        opened = Checkpoint.open(place, weights=False)
        speaking = opened.arch(ignore_keys=opened.full_config())
    answers = _count(source)
    _refuse_few(source, answers, prompts)
    texts = answers * (generation.new_tokens + _PROMPT_TOKENS)
    item = native_dtype(machine).itemsize
    weights = speaking.parameters() * item
    steps = -(-answers // ROWS) * (generation.new_tokens + _PROMPT_TOKENS // 2)
    kept = 2 * speaking.layers * speaking.sizes["residual"] * item * ROWS
    held = weights + kept * (generation.new_tokens + _PROMPT_TOKENS)
    held += 3 * 8 * ROWS * speaking.sizes["vocab"]
    read = 0.0 if machine.device == "cuda" else weights / READ_BYTES_A_SECOND
    return Talk(
        "dense" if generation.speaker == DENSE else generation.speaker,
        speaking,
        Cost(
            ram_bytes=2 * _PROCESS_BYTES + (0 if machine.device == "cuda" else held),
            gpu_bytes=held if machine.device == "cuda" else 0,
            disk_bytes=12 * texts,
            flops=2.0 * texts * speaking.parameters(),
            moved_bytes=weights,
            seconds=8 + steps * (read + STEP_SECONDS * speaking.layers),
        ),
        f"up to {answers:,} answers of {generation.new_tokens} tokens to "
        f"{_asked(generation, prompts)}",
    )


def speaker_at(generation: Generation, root: Path) -> Path:
    """The directory below the data root that a source names.

    Raises:
        PlanError: it is not there, or lies elsewhere.
    """
    place, where = root / generation.speaker, "generated.from"
    if not place.resolve().is_relative_to(root.resolve()):
        raise PlanError(
            where,
            f"`{shown(generation.speaker)}` leaves the data root",
            "name a directory below it (`--data-root` moves it)",
        )
    if not place.is_dir():
        raise PlanError(
            where,
            f"`{shown(generation.speaker)}` is neither `dense`, nor an address, nor a directory "
            "below the data root",
            "write `from: dense`, `https://host/v1`, or the path of a model or an engine",
        )
    return place


def _served(source: Generated, arch: Arch, prompts: tuple[Prompt, ...]) -> Talk:
    generation = source.generated
    refuse_unasked(generation)
    answers = count_of(generation, prompts)
    _refuse_few(source, answers, prompts)
    seconds = answers * _SERVER_SECONDS / generation.at_once
    said = sum(sum(len(str(one.get("content"))) for one in p.as_messages()) for p in prompts)
    note = (
        f"sends {_asked(generation, prompts)} ({said:,} characters) to {generation.speaker} for "
        f"{answers:,} answers of at most {generation.new_tokens} tokens; {TERMS}"
    )
    cost = Cost(ram_bytes=_PROCESS_BYTES, disk_bytes=12 * answers * generation.new_tokens,
                seconds=seconds)  # fmt: skip
    return Talk(str(generation.model), arch, cost, note)


def _asked(generation: Generation, prompts: tuple[Prompt, ...]) -> str:
    if generation.prompts == "none":
        return "no prompt (free samples)"
    of = "bundled " if generation.prompts == "bundled" else ""
    return f"{len(prompts)} {of}prompt{'' if len(prompts) == 1 else 's'}"


def _count(source: Generated) -> int:
    """How many answers are drawn, or about how many it may take."""
    generation = source.generated
    if generation.answers is not None:
        return generation.answers
    assert source.samples is not None
    # Answers end of themselves, most of them before they must.
    each = max(1, generation.new_tokens * 2 // 3)
    count = -(-source.samples * source.length // each)
    return -(-count // ROWS) * ROWS


def _refuse_few(source: Generated, answers: int, prompts: tuple[Prompt, ...]) -> None:
    """Refuses fewer tokens than the windows take, however long all answers are."""
    generation = source.generated
    if generation.answers is None and not generation.is_server:
        if generation.temperature > 0:
            return
        answers = len(prompts)
    if source.samples is None:
        return
    longest = max((_characters(prompt) for prompt in prompts), default=0)
    most = answers * (generation.new_tokens + longest + 64)
    if most < source.samples * source.length:
        raise PlanError(
            "generated.answers",
            f"{answers} answers of {generation.new_tokens} tokens cannot give {source.samples} "
            f"windows of {source.length}",
            "write more `answers` or `new_tokens`, fewer `samples`, or a smaller `length`",
        )


def _characters(prompt: Prompt) -> int:
    return sum(len(str(one.get("content"))) for one in prompt.as_messages())
