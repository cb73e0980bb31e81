"""What a model says to a set of tokens, kept in a file: for a student that learns from it.

Of each position the log-probabilities of the likeliest tokens, and of all others together, so that
what is kept is a distribution: a divergence from it is zero for the same model and never below. One
pass computes it, with one block of the model in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.passes.cost import PassCost, pass_cost
from prune_export.calibrate.passes.statistics import gather
from prune_export.calibrate.statistics.api import Scope
from prune_export.calibrate.streaming.skip import Unit
from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError
from prune_export.machine import Machine
from prune_export.system.files import open_regular
from prune_export.system.platforms import write_at

_FILE: Final = "answers.safetensors"
_LEAST_IDS: Final = 1 << 16
"""Vocabularies up to this size are numbered with two bytes."""


def answer_bytes(vocabulary: int, outcomes: int) -> int:
    """Bytes that a token takes on the disk."""
    return sum(_row_bytes(vocabulary, outcomes).values())


def answers_cost(
    arch: Arch, samples: int, length: int, outcomes: int, machine: Machine
) -> PassCost:
    """What it takes to keep a model's answers, from shapes alone."""
    found = pass_cost(arch, (_Said(0, 1.0, -1),), samples, length, machine)
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
) -> None:
    """Writes a model's likeliest `outcomes` next tokens at each position of the windows into `out`.

    Log-probabilities are those of the logits divided by `temperature`; `out` is a directory. With
    `context.scratch`, a pass that is killed goes on from there, and ends in the same bytes.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
    """
    with Path(out, _FILE).open("wb") as file:
        statistic = _Said(min(outcomes, arch.sizes["vocab"]), temperature, file.fileno())
        gather(checkpoint, (statistic,), context, arch=arch)


@dataclass(frozen=True)
class KeptAnswers:
    """Answers that lie in a directory; read window by window."""

    path: Path
    samples: int
    length: int
    outcomes: int
    temperature: float

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The answers in a directory that `keep_answers` wrote.

        Raises:
            CheckpointError: the file is none, or is cut off.
        """
        from safetensors import SafetensorError, safe_open

        path = directory / _FILE
        open_regular(path, None, "a teacher's answers").close()
        try:
            with safe_open(path, framework="pt") as file:
                samples, positions, outcomes = file.get_slice("ids").get_shape()
                temperature = float((file.metadata() or {})["temperature"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(
                str(path), f"is not a teacher's answers: {error}", "delete it; it is made again"
            ) from None
        return cls(path, samples, positions + 1, outcomes, temperature)

    def of(self, windows: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 `[windows, length - 1, k]` and log-probabilities float32 `[…, k or k + 1]`."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            kept = {name: file.get_slice(name) for name in ("ids", "log_p")}
            found = {
                name: torch.cat([rows[at : at + 1] for at in windows.tolist()])
                for name, rows in kept.items()
            }
        return found["ids"].to(torch.int64).to(device), found["log_p"].to(device)


@dataclass(frozen=True)
class _Said:
    """The statistic: answers that are written to an open `file`."""

    outcomes: int
    temperature: float
    file: int
    samples: int | None = None
    length: int | None = None
    skipped: tuple[Unit, ...] = ()

    def collector(self, scope: Scope) -> _Writer:
        return _Writer(self, scope)

    def __repr__(self) -> str:
        """Names the pass, which goes on wherever its result is put."""
        return f"answers({self.outcomes}, {self.temperature})"


class _Writer:
    """Writes answers as they come, header first."""

    def __init__(self, asked: _Said, scope: Scope) -> None:
        self._asked, self._scope = asked, scope
        self._at: dict[str, int] = {}
        self._row: dict[str, int] = {}

    def read(self, sample: int, start: int, logits: torch.Tensor) -> None:
        vocab = logits.shape[1]
        if not self._at:
            self._begin(vocab)
        log_p = torch.log_softmax(logits / self._asked.temperature, dim=-1)
        top, ids = log_p.topk(self._asked.outcomes, dim=-1)
        if self._asked.outcomes < vocab:
            others = log_p.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
            top = torch.cat([top, others], dim=1)
        kept = {"ids": ids.to(torch.int32).cpu(), "log_p": top.cpu()}
        for name, rows in kept.items():
            content = rows.contiguous().numpy()
            if name == "ids" and vocab <= _LEAST_IDS:
                content = content.astype("<u2")
            at = sample * (self._scope.length - 1) + start
            _write(self._asked.file, content.tobytes(), self._at[name] + at * self._row[name])

    def _begin(self, vocab: int) -> None:
        """Lays the file out."""
        self._row = _row_bytes(vocab, self._asked.outcomes)
        positions = self._scope.samples * (self._scope.length - 1)
        header: dict[str, Any] = {"__metadata__": {"temperature": repr(self._asked.temperature)}}
        at = 0
        # The larger items first: each begins at a multiple of its size.
        for name, dtype in (("log_p", "F32"), ("ids", "U16" if vocab <= _LEAST_IDS else "I32")):
            size = positions * self._row[name]
            columns = self._row[name] // (2 if dtype == "U16" else 4)
            shape = [self._scope.samples, self._scope.length - 1, columns]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            self._at[name], at = at, at + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._at = {name: place + 8 + len(text) for name, place in self._at.items()}
        _write(self._asked.file, struct.pack("<Q", len(text)) + text, 0)

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
