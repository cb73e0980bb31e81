"""A model or an engine on this machine that answers, in a process of its own.

Answers are drawn so many at once, always the same ones together: floats round otherwise in another
batch, and a run that goes on is to end in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import Sample, Tokenizer, native_dtype
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_ends
from prune_export.contracts import BuildRecord
from prune_export.errors import CheckpointError, PlanError
from prune_export.generated.journal import Journal
from prune_export.generated.prompts import Prompt, prompt_ids, templated
from prune_export.machine import Machine
from prune_export.progress import Task
from prune_export.recipe import Generation
from prune_export.sampling import Sampling, seed_of
from prune_export.system.files import REPORT_BYTES, read_json_object
from prune_export.verify import Engine
from prune_export.verify.session import Session

ROWS: Final = 16
"""Answers that are drawn at once; part of what decides their bytes."""

_WHERE: Final = "data  generated"


@dataclass(frozen=True)
class Local:
    """What speaks: an `engine`, and the directory of its tokenizer.

    `same_tokens` says that the model which learns has the same ones.
    """

    engine: Engine
    tokenizer: Path
    same_tokens: bool = True


def dense(path: Path, machine: Machine) -> Local:
    """The model of a directory, as it is computed fastest."""
    precision = str(native_dtype(machine)).removeprefix("torch.")
    return Local(Engine.pytorch(path, precision=precision, logits="last"), path)


def local_at(path: Path, machine: Machine, *, learner: Path) -> Local:
    """The model, or the engine of a result, in a directory; `learner` has the learner's tokenizer.

    Raises:
        CheckpointError: it is neither.
    """
    record = _engine_record(path)
    found = dense(path, machine) if record is None else Local(Engine.of(record, path), path)
    files = [folder / "tokenizer.json" for folder in (path, learner)]
    same = all(file.is_file() for file in files) and len({file.read_bytes() for file in files}) == 1
    return Local(found.engine, path, same)


def _engine_record(path: Path) -> BuildRecord | None:
    """The build record of an engine, from the report of the result that it is part of."""
    report = path.parent / "report.json"
    listed: Any = ()
    if report.is_file():
        listed = read_json_object(report, "a report", REPORT_BYTES).get("exports")
    for one in listed if isinstance(listed, list) else ():
        if isinstance(one, Mapping) and one.get("directory") == path.name:
            try:
                return BuildRecord.from_json(one)
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(
                    str(report), f"says of `{path.name}` what is no engine", "export it again"
                ) from None
    if not any(path.glob("*.safetensors")):
        raise CheckpointError(
            str(path),
            "is neither a model's directory nor that of an engine in a result",
            "name a directory with safetensors, or one that a result's report.json lists",
        )
    return None


def feed(
    local: Local, prompts: Sequence[Prompt], generation: Generation
) -> tuple[list[list[int]], bool]:
    """The tokens of each prompt, and whether they went through a chat template.

    Raises:
        PlanError: a template refuses a prompt, or one is too long for the model.
    """
    tokenizer = Tokenizer.load(local.tokenizer)
    template = templated(generation, tokenizer)
    fed = [
        prompt_ids(one, tokenizer, template=template, where=f"{_WHERE}  prompt {number}")
        for number, one in enumerate(prompts)
    ]
    opened = Checkpoint.open(local.engine.path, weights=False).full_config()
    limits = (opened.get("max_position_embeddings"), opened.get("n_positions"),
              local.engine.longest if local.engine.exporter != "pytorch" else None)  # fmt: skip
    room = min((int(limit) for limit in limits if limit), default=None)
    for number, ids in enumerate(fed):
        if not ids:
            raise PlanError(f"{_WHERE}  prompt {number}", "has no token", "remove it")
        if room is not None and len(ids) + generation.new_tokens > room:
            raise PlanError(
                f"{_WHERE}  prompt {number}",
                f"has {len(ids)} tokens and {generation.new_tokens} shall follow, but what "
                f"answers takes {room}",
                "write fewer `new_tokens`, or leave the prompt out",
            )
    return fed, template


def answer_locally(
    local: Local,
    prompts: Sequence[Prompt],
    generation: Generation,
    machine: Machine,
    journal: Journal,
    enough: Callable[[Sequence[Sample]], bool],
    task: Task,
) -> None:
    """Draws answers into a journal until there are enough: to each prompt in turn, then anew."""
    fed, template = feed(local, prompts, generation)
    tokenizer = Tokenizer.load(local.tokenizer)
    ends = {*load_ends(local.tokenizer), *tokenizer.separator}
    total = generation.answers
    if generation.temperature == 0:
        total = min(total or len(prompts), len(prompts))  # a second answer would be the first
    if len(journal.samples) != total:
        # A batch that was cut off is drawn again whole.
        journal.keep_first(len(journal.samples) // ROWS * ROWS)
    task.advance(sum(len(one.ids or ()) - one.given for one in journal.samples))
    how = Sampling(generation.temperature, generation.top_p)
    with ExitStack() as stack:
        session: Session | None = None
        while not enough(journal.samples):
            first = len(journal.samples)
            places = range(first, first + ROWS if total is None else min(first + ROWS, total))
            if not places:
                return
            session = session or stack.enter_context(Session(local.engine, machine))
            turns = [divmod(place, len(prompts)) for place in places]
            said = session.drawn(
                [fed[number] for _, number in turns],
                generation.new_tokens,
                how=how,
                seeds=[seed_of(generation.seed, "answer", number, draw) for draw, number in turns],
                ends=ends,
                task=task,
            )
            journal.add(
                _sample(local, prompts[number], number, draw, fed[number], tokens, tokenizer, ends,
                        template)
                for (draw, number), tokens in zip(turns, said, strict=True)
            )  # fmt: skip


def _sample(
    local: Local,
    prompt: Prompt,
    number: int,
    draw: int,
    given: list[int],
    tokens: list[int],
    tokenizer: Tokenizer,
    ends: set[int],
    template: bool,
) -> Sample:
    ended = bool(tokens) and tokens[-1] in ends
    text = tokenizer.backend.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    messages = prompt.as_messages() if template and prompt != Prompt() else None
    if prompt.messages is not None:
        messages = prompt.as_messages()
    return Sample(
        prompt=number,
        draw=draw,
        answer=str(text),
        ended=ended,
        messages=messages,
        text=prompt.text if messages is None else None,
        ids=[*given, *tokens] if local.same_tokens else None,
        given=len(given) if local.same_tokens and prompt != Prompt() else 0,
        document=prompt.document,
    )
