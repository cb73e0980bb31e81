"""What a model says to a set of tokens, kept in a file: for a student that learns from it.

Of each position the log-probabilities of the likeliest tokens, and of all others together, so that
what is kept is a distribution: a divergence from it is zero for the same model and never below. One
pass computes it, with one block of the model in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.data.token_set import TokenSet
from prune_export.calibrate.passes.cost import PassCost, pass_cost
from prune_export.calibrate.passes.statistics import gather
from prune_export.calibrate.statistics.api import Scope
from prune_export.calibrate.streaming.driver import batch_windows
from prune_export.calibrate.streaming.skip import Unit
from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError
from prune_export.machine import Machine
from prune_export.system.files import open_regular
from prune_export.system.platforms import write_at
from prune_export.system.processes import ALONE, Team, refuse_absent, shares

_FILE: Final = "answers.safetensors"
_LEAST_IDS: Final = 1 << 16
"""Vocabularies up to this size are numbered with two bytes."""


def answer_bytes(vocabulary: int, outcomes: int) -> int:
    """The bytes on disk of one position: its likeliest tokens and their log-probabilities."""
    return sum(_row_bytes(vocabulary, outcomes).values())


def answers_cost(
    arch: Arch, samples: int, length: int, outcomes: int, machine: Machine
) -> PassCost:
    """Estimates the cost of keeping a model's answers, from shapes alone."""
    found = pass_cost(arch, (_Said(0, 1.0, _Nowhere()),), samples, length, machine)
    vocab, residual = arch.sizes["vocab"], arch.sizes["residual"]
    head = 4 * vocab * residual
    logits = 4 * 3 * max(vocab, 1 << 24)
    written = samples * (length - 1) * answer_bytes(vocab, outcomes)
    on_gpu = found.gpu_bytes + head + logits if machine.device == "cuda" else 0
    return PassCost(
        found.ram_bytes + head + logits,
        on_gpu,
        found.disk_bytes + written,
        found.flops + 2.0 * samples * length * arch.head_parameters(),
        found.moved_bytes + written,
        found.seconds,
    )


def keep_answers(
    checkpoint: Checkpoint,
    context: CalibrationContext,
    out: Path,
    *,
    outcomes: int,
    temperature: float,
    arch: Arch,
    team: Team = ALONE,
) -> None:
    """Writes a model's likeliest `outcomes` next tokens at each position of the windows into `out`.

    Log-probabilities are those of the logits divided by `temperature`; `out` is a directory. With
    `context.scratch`, a pass that is killed goes on from there, and ends in the same bytes. A
    `team` shares the windows; others send the leader what they find, which writes it, and a killed
    pass begins again.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
        StageError: another process of the team is gone.
    """
    kept = min(outcomes, arch.sizes["vocab"])
    with Path(out, _FILE).open("wb") as file:
        tokens, machine = context.tokens, context.machine
        writer = _File(file.fileno(), tokens.ids.shape, kept, temperature)
        if team.size == 1:
            gather(checkpoint, (_Said(kept, temperature, writer),), context, arch=arch)
            return
        parts = shares(tokens.samples, batch_windows(machine.device, tokens.length), team.size)
        own = replace(context, machine=machine.share(team.here), engines=None)
        told = replace(own, tokens=TokenSet.of(tokens.ids), scratch=None, progress=None)
        job = _Job(checkpoint.path, told, tuple(parts), kept, temperature)
        team.call(_say_part, job)
        replace(job, context=own).gather(0, checkpoint, arch, writer)
        for (at, vocab, rows), content in team.received():
            writer.write(at, vocab, rows, content)


@dataclass(frozen=True)
class _Job:
    """A pass that several processes share; `parts` are the windows of each."""

    path: Path
    context: CalibrationContext
    parts: tuple[range, ...]
    outcomes: int
    temperature: float

    def gather(self, number: int, checkpoint: Checkpoint, arch: Arch, sink: Sink) -> None:
        """One process's part; what it finds goes to `sink`."""
        part = self.parts[number]
        if part:
            ids = self.context.tokens.ids[part.start : part.stop]
            own = replace(self.context, tokens=TokenSet.of(ids))
            asked = _Said(self.outcomes, self.temperature, sink, first=part.start)
            gather(checkpoint, (asked,), own, arch=arch)


def _say_part(team: Team, job: _Job) -> None:
    """Another process's part in the pass."""
    refuse_absent(team, job.path)
    opened = Checkpoint.open(job.path)
    # The plan has answered for keys that the table does not know.
    arch = opened.arch(ignore_keys=opened.full_config())
    job.gather(team.rank, opened, arch, _Sender(team))
    team.end()


@dataclass(frozen=True)
class KeptAnswers:
    """A teacher's kept answers, read window by window.

    Of each window `length - 1` positions, and of each `outcomes` tokens; log-probabilities are of
    logits divided by `temperature`.
    """

    path: Path
    samples: int
    length: int
    outcomes: int
    temperature: float

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Opens the answers in a directory that `keep_answers` wrote.

        Raises:
            CheckpointError: it is another file, or is cut off.
        """
        from safetensors import SafetensorError, safe_open

        path = directory / _FILE
        open_regular(path, None, "a teacher's answers").close()
        try:
            with safe_open(path, framework="pt") as file:
                samples, positions, outcomes = file.get_slice("ids").get_shape()
                temperature = float((file.metadata() or {})["temperature"])
                given = file.get_slice("log_p").get_shape()
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                str(path), f"is not a teacher's answers: {error}", "delete it; it is made again"
            ) from None
        if given not in [[samples, positions, outcomes + more] for more in (0, 1)]:
            raise CheckpointError(
                str(path),
                f"has log_p {given}, expected as many as ids {[samples, positions, outcomes]}, or "
                "one more",
                "delete it; it is made again",
            )
        return cls(path, samples, positions + 1, outcomes, temperature)

    def of(self, windows: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads ids int64 `[windows, length - 1, k]`, and float32 log-probabilities of them.

        Where these are k + 1, the last is that of all other tokens together.
        """
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            kept = {name: file.get_slice(name) for name in ("ids", "log_p")}
            found = {
                name: torch.cat([rows[at : at + 1] for at in windows.tolist()])
                for name, rows in kept.items()
            }
        return found["ids"].to(torch.int64).to(device), found["log_p"].to(device)


class Sink(Protocol):
    """Where answers go: `rows` positions from `at` on, counted through all windows."""

    def write(self, at: int, vocab: int, rows: int, content: bytes) -> None: ...


@dataclass(frozen=True)
class _Nowhere:
    """Where rows go of which only the cost is asked."""

    def write(self, at: int, vocab: int, rows: int, content: bytes) -> None:
        del at, vocab, rows, content


@dataclass(frozen=True)
class _Said:
    """The statistic: answers that go to `sink`; the windows are those from `first` on."""

    outcomes: int
    temperature: float
    sink: Sink
    samples: int | None = None
    length: int | None = None
    skipped: tuple[Unit, ...] = ()
    first: int = 0

    def collector(self, scope: Scope) -> _Writer:
        return _Writer(self, scope)

    def __repr__(self) -> str:
        """Names the pass, which goes on wherever its result is put."""
        return f"answers({self.outcomes}, {self.temperature})"


class _Writer:
    """Makes rows of what the model says, and hands them on: first all log_p, then all ids."""

    def __init__(self, asked: _Said, scope: Scope) -> None:
        self._asked, self._scope = asked, scope

    def read(self, sample: int, start: int, logits: torch.Tensor) -> None:
        rows, vocab = logits.shape
        cooled = logits if self._asked.temperature == 1 else logits / self._asked.temperature
        log_p = torch.log_softmax(cooled, dim=-1)
        del cooled  # rows of the vocabulary: as few arrays of them as can be
        top, ids = log_p.topk(self._asked.outcomes, dim=-1)
        if self._asked.outcomes < vocab:
            others = _logsumexp_(log_p.scatter_(1, ids, -torch.inf))
            top = torch.cat([top, others], dim=1)
        numbers = ids.to(torch.int32).cpu().numpy()
        content = top.cpu().contiguous().numpy().tobytes()
        content += numbers.astype("<u2" if vocab <= _LEAST_IDS else "<i4").tobytes()
        at = (self._asked.first + sample) * (self._scope.length - 1) + start
        self._asked.sink.write(at, vocab, rows, content)

    def see(self, layer: int, start: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        del layer, start, inputs, outputs

    def hear(self, dense: float, skipped: Mapping[Unit, float]) -> None:
        del dense, skipped

    def state(self) -> Mapping[str, torch.Tensor]:
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        del state

    def result(self) -> None:
        return


@dataclass(frozen=True)
class _Sender:
    """Sends rows to the leader of a team."""

    team: Team

    def write(self, at: int, vocab: int, rows: int, content: bytes) -> None:
        self.team.send((at, vocab, rows), content)


class _File:
    """Writes rows to an open file, whose header follows from the first of them."""

    def __init__(self, file: int, windows: torch.Size, outcomes: int, temperature: float) -> None:
        self._file, self._outcomes, self._temperature = file, outcomes, temperature
        self._samples, self._positions = windows[0], windows[1] - 1
        self._at: dict[str, int] = {}
        self._row: dict[str, int] = {}

    def write(self, at: int, vocab: int, rows: int, content: bytes) -> None:
        if not self._at:
            self._begin(vocab)
        cut = rows * self._row["log_p"]
        for name, part in (("log_p", content[:cut]), ("ids", content[cut:])):
            _write(self._file, part, self._at[name] + at * self._row[name])

    def _begin(self, vocab: int) -> None:
        """Lays the file out."""
        self._row = _row_bytes(vocab, self._outcomes)
        positions = self._samples * self._positions
        header: dict[str, Any] = {"__metadata__": {"temperature": repr(self._temperature)}}
        at = 0
        # The larger items first: each begins at a multiple of its size.
        for name, dtype in (("log_p", "F32"), ("ids", "U16" if vocab <= _LEAST_IDS else "I32")):
            size = positions * self._row[name]
            columns = self._row[name] // (2 if dtype == "U16" else 4)
            shape = [self._samples, self._positions, columns]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            self._at[name], at = at, at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._at = {name: place + 8 + len(text) for name, place in self._at.items()}
        _write(self._file, struct.pack("<Q", len(text)) + text, 0)


def _logsumexp_(rows: torch.Tensor) -> torch.Tensor:
    """`rows.logsumexp(1, keepdim=True)` to the bit, in the memory of `rows`, which is lost."""
    largest = rows.amax(1, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0)
    return rows.sub_(largest).exp_().sum(1, keepdim=True).log_().add_(largest)


def _row_bytes(vocab: int, outcomes: int) -> dict[str, int]:
    """Bytes of a position's numbers and of its log-probabilities."""
    kept = min(outcomes, vocab)
    with_others = kept + (kept < vocab)
    return {"ids": kept * (2 if vocab <= _LEAST_IDS else 4), "log_p": 4 * with_others}


def _write(file: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = write_at(file, view, offset)
        view, offset = view[count:], offset + count
