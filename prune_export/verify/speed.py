"""Measures the pruned model's engine against the dense model's engine of the same exporter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Final

import numpy as np
from pydantic import Field

from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent
from prune_export.recipe.stages import Workload
from prune_export.units import text_from_seconds
from prune_export.verify.compare import Comparison, compare
from prune_export.verify.engine import Engine
from prune_export.verify.results import Phase, Speed
from prune_export.verify.session import Session

PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")
ROLES: Final = ("dense", "again", "pruned")
_WARM_STEPS: Final = 4

LEAST_LAUNCHES: Final = 3
"""With fewer there is no interval."""


@dataclass(frozen=True)
class Effort:
    """The effort of a measurement: launches, rounds, and time limits.

    Each of at least `launches` launches starts fresh processes and times `rounds` rounds; more
    launches follow, up to `most_launches`, until every interval is narrower than `width` (a
    fraction of its ratio) or `seconds` have gone. When time is short a launch has fewer rounds, and
    there are fewer launches; what is always finished are three launches of one round.
    """

    launches: Annotated[int, Field(ge=3)] = 5
    rounds: Annotated[int, Field(ge=1)] = 4
    most_launches: Annotated[int, Field(ge=3)] = 12
    width: Annotated[float, Field(gt=0)] = 0.06
    seconds: Annotated[float, Field(gt=0)] = 180.0


@dataclass
class _Samples:
    """Samples in seconds, by role, launch and round."""

    seconds: dict[str, list[list[float]]] = field(
        default_factory=lambda: {role: [] for role in ROLES}
    )

    def compared(self, seed: int) -> Comparison:
        dense, again, pruned = (self.seconds[role] for role in ROLES)
        return compare(dense, again, pruned, seed=seed)


_AllSamples = Mapping[tuple[Workload, Phase], _Samples]


def measure_speed(
    dense: Engine,
    pruned: Engine,
    workloads: Sequence[Workload],
    ids: np.ndarray,
    machine: Machine,
    *,
    name: str | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Speed]:
    """Measures speed on each workload; gives two results each, prefill and decode.

    `ids` are token ids of any shape, fed to both models in reading order and over again where
    there are too few. Every engine has its own process and only one of them works at a time; a
    second process of the dense engine gives the noise floor (`compare`). Where three engines don't
    fit into memory together they take turns in it: each sample then has a process of its own.

    Raises:
        StageError: an engine died.
        VerifyError: a workload is empty, or there are no token ids.
    """
    _check(workloads, ids)
    effort, name = effort or Effort(), name or pruned.exporter
    samples = {(workload, phase): _Samples() for workload in workloads for phase in PHASES}
    bench = _Bench(dense, pruned, workloads, ids, machine, np.random.default_rng(seed), clock)
    start, told = clock(), progress or Silent()
    least = min(LEAST_LAUNCHES, effort.launches)
    with told.task(f"speed of {name}", effort.launches) as task:
        for launch in range(effort.most_launches):
            left = effort.seconds - (clock() - start)
            share = left / max(1, effort.launches - launch)
            # Launches beyond these are for intervals that are too wide still.
            heard = task.advance if launch < effort.launches else _unheard
            each = bench.launch(samples, effort.rounds, share, heard)
            if launch == 0 and least * each > effort.seconds:
                told.say(
                    f"speed of {name}: {least} launches, the fewest that make an interval, take "
                    f"about {text_from_seconds(least * each)} here, not "
                    f"{text_from_seconds(effort.seconds)}: one takes {text_from_seconds(each)}"
                )
            gone = clock() - start
            if launch + 1 >= effort.launches:
                found = [one.compared(seed) for one in samples.values()]
                late = gone >= effort.seconds
                if late or max(one.width for one in found) <= effort.width:
                    break
            elif launch + 1 >= least and gone + each > effort.seconds:
                task.advance(effort.launches - launch - 1)
                break
    return [
        _speed(name, workload, phase, one, _bound(dense, pruned), seed)
        for (workload, phase), one in samples.items()
    ]


def _unheard(done: float) -> None:
    del done


@dataclass
class _Bench:
    """The engines to measure, and the workloads."""

    dense: Engine
    pruned: Engine
    workloads: Sequence[Workload]
    ids: np.ndarray
    machine: Machine
    random: np.random.Generator
    clock: Callable[[], float]

    def launch(
        self, samples: _AllSamples, rounds: int, seconds: float, advance: Callable[[float], None]
    ) -> float:
        """Starts fresh processes, and times one to `rounds` rounds within `seconds`.

        `advance` hears after each round how much of the launch that was, 1 in all.

        Returns:
            What the shortest launch takes: the seconds until the first round was done.
        """
        start, left, shortest = self.clock(), 1.0, 0.0
        for one in samples.values():
            for launches in one.seconds.values():
                launches.append([])
        together = self._fit_together()
        with ExitStack() as stack:
            held = self._start(stack, ROLES) if together else {}
            for at in range(rounds if together else 1):
                if at and self.clock() - start >= seconds:
                    break
                # A round in memory is as short as it can be: the three, one workload at a time.
                groups = [[one] for one in self.workloads] if together else [self.workloads]
                for group in groups:
                    for role in self.random.permutation(ROLES):
                        with self._session(held, str(role)) as session:
                            self._sample(session, str(role), group, samples)
                advance(1 / rounds)
                left -= 1 / rounds
                shortest = shortest or self.clock() - start
        advance(left)
        return shortest

    def _sample(
        self, session: Session, role: str, group: Sequence[Workload], samples: _AllSamples
    ) -> None:
        for workload in group:
            tokens = tokens_of(workload, self.ids)
            for phase, seconds in zip(PHASES, session.time(tokens, workload.prompt), strict=True):
                samples[workload, phase].seconds[role][-1].append(seconds)

    @contextmanager
    def _session(self, held: Mapping[str, Session], role: str) -> Iterator[Session]:
        if held:
            yield held[role]
            return
        with ExitStack() as stack:
            yield self._start(stack, (role,))[role]

    def _start(self, stack: ExitStack, roles: Sequence[str]) -> dict[str, Session]:
        """Starts processes side by side, then warms them up one after the other."""
        engines = {role: self.pruned if role == "pruned" else self.dense for role in roles}
        sessions = {
            role: stack.enter_context(Session(engine, self.machine))
            for role, engine in engines.items()
        }
        for session in sessions.values():
            session.ready()
        # On a GPU what is first seen costs most: TensorRT-RTX compiles kernels for each new length
        # of the cache, others load them and get memory. So every step that is timed is taken once.
        whole = self.machine.device == "cuda"
        for session in sessions.values():
            for workload in self.workloads:
                tokens = tokens_of(workload, self.ids)
                steps = workload.new if whole else _WARM_STEPS
                session.time(tokens[:, : workload.prompt + steps], workload.prompt)
        return sessions

    def _fit_together(self) -> bool:
        """Whether three engines fit: their files, and half again for what runtimes repack."""
        budget = self.machine.gpu_bytes if self.machine.device == "cuda" else self.machine.ram_bytes
        return (
            1.5 * (2 * _directory_bytes(self.dense.path) + _directory_bytes(self.pruned.path))
            <= budget
        )


def tokens_of(workload: Workload, ids: np.ndarray) -> np.ndarray:
    """Fills a workload with token ids, int64 `[batch, prompt + new]`, repeating `ids` if short."""
    shape = (workload.batch, workload.prompt + workload.new)
    return np.resize(np.asarray(ids, dtype=np.int64).ravel(), shape)


def _speed(
    name: str, workload: Workload, phase: Phase, samples: _Samples, bound: float, seed: int
) -> Speed:
    found = samples.compared(seed)
    flat = {role: [s for launch in samples.seconds[role] for s in launch] for role in ROLES}
    tokens = workload.batch * (workload.prompt if phase == "prefill" else 1)
    return Speed(
        engine=name,
        workload=workload,
        phase=phase,
        dense_seconds=flat["dense"],
        pruned_seconds=flat["pruned"],
        ratio=found.ratio,
        low=found.low,
        high=found.high,
        floor_low=found.floor_low,
        floor_high=found.floor_high,
        bound=bound,
        verdict=found.verdict,
        dense_tokens_per_second=tokens / median(flat["dense"]),
        pruned_tokens_per_second=tokens / median(flat["pruned"]),
        again_seconds=flat["again"],
        rounds=[len(launch) for launch in samples.seconds["dense"]],
    )


def _bound(dense: Engine, pruned: Engine) -> float:
    if not (dense.weight_bytes and pruned.weight_bytes):
        return 0.0
    return dense.weight_bytes / pruned.weight_bytes


def _directory_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _check(workloads: Sequence[Workload], ids: np.ndarray) -> None:
    for workload in workloads:
        if min(workload.batch, workload.prompt, workload.new) < 1:
            raise VerifyError(
                f"workload {workload}",
                "got a size below 1, expected batch, prompt and new to be at least 1",
                "time at least one token of each phase",
            )
    if not np.size(ids):
        raise VerifyError("speed", "got no token ids to feed", "give the tokens of some real text")
