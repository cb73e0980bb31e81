"""Runs a search's candidates: in this process, in several, or on a Ray cluster.

All of them share one store: a job names the stages and the checkpoint to apply them to, and gives
back artifact ids and a perplexity. The artifacts are the same whoever makes them.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from prune_export.calibrate import TokenSet
from prune_export.errors import MissingExtra, PruneExportError, StageError
from prune_export.execution.context import RunContext
from prune_export.execution.inputs import Base
from prune_export.execution.measure import perplexity_of
from prune_export.execution.stages import run_stage
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Search, Stage
from prune_export.store import Store


@dataclass(frozen=True)
class Job:
    """Stages to apply to the checkpoint at `path`, which is then measured.

    `data` are the ids of the token sets by name, `validation` names the one that measures;
    `teacher` is there where a stage learns from one.
    """

    label: str
    stages: tuple[Stage, ...]
    path: Path
    id: str
    data: Mapping[str, str]
    validation: str
    teacher: Base | None = None


@dataclass(frozen=True)
class Done:
    """The result of a job: the artifact id of each stage, and the final validation perplexity."""

    made: tuple[str, ...]
    perplexity: float


@dataclass(frozen=True)
class Desk:
    """What another process needs to make a `RunContext` of its own."""

    store: Path
    machine: Machine
    force: frozenset[str]
    ignore_keys: tuple[str, ...]
    command: str

    @staticmethod
    def of(context: RunContext, workers: int) -> Desk:
        """Gives each of `workers` an equal share of the memory and threads of a context."""
        machine = replace(
            context.machine,
            threads=max(1, context.machine.threads // workers),
            ram_bytes=context.machine.ram_bytes // workers,
            gpu_bytes=context.machine.gpu_bytes // workers,
        )
        return Desk(
            context.store.root, machine, context.force, context.ignore_keys, context.command
        )

    def work(self, job: Job) -> Done:
        """Runs a job; called in the other process.

        Raises:
            StageError: the store is not there, as on another machine without it.
        """
        if not self.store.is_dir():
            raise StageError(
                f"search  {job.label}",
                f"the store {self.store} is not on this machine",
                "use a store that all machines of the cluster share (`--store`)",
            )
        import torch

        torch.set_num_threads(self.machine.threads)
        context = RunContext(
            Store(self.store), self.machine, Silent(), self.force, self.ignore_keys, self.command
        )
        return done(context, job)


def done(context: RunContext, job: Job) -> Done:
    """Runs a job in this process."""
    made: list[str] = []
    path, id_ = job.path, job.id
    for stage in job.stages:
        tokens = None
        if stage.data in job.data:
            artifact = context.store.get(job.data[stage.data])
            assert artifact is not None, "data is made before any candidate"
            tokens = artifact, TokenSet.load(artifact.path / "tokens.safetensors")
        result = run_stage(context, stage, path, id_, tokens, job.teacher)
        path, id_ = result.path, result.id
        made.append(id_)
    validation = context.store.get(job.data[job.validation])
    last = context.store.get(id_)
    assert validation is not None
    assert last is not None
    text = TokenSet.load(validation.path / "tokens.safetensors")
    return Done(tuple(made), perplexity_of(context, job.label, last, text))


Each = Callable[[Sequence[Job], str], Generator[tuple[int, Done]]]
"""Does jobs (under a title that progress shows); gives them by number as they are done."""


@contextmanager
def open_executor(search: Search, context: RunContext) -> Iterator[Each]:
    """Opens the executor of a search; a context manager of a function that runs jobs.

    Raises:
        MissingExtra: Ray is wanted and not installed.
        StageError: a worker was killed or crashed; the candidate is named.
    """
    if search.executor == "ray":
        hiring = _on_ray(search, context)
    elif search.workers > 1:
        hiring = _in_processes(search, context)
    else:
        hiring = _here(context)
    with hiring as work:

        def each(jobs: Sequence[Job], title: str) -> Generator[tuple[int, Done]]:
            with context.progress.task(f"search: {title}", len(jobs)) as task:
                for number, result in work(jobs):
                    context.progress.say(f"search: {jobs[number].label}: {result.perplexity:.2f}")
                    task.advance()
                    yield number, result

        yield each


_Work = Callable[[Sequence[Job]], Iterator[tuple[int, Done]]]


@contextmanager
def _here(context: RunContext) -> Iterator[_Work]:
    def work(jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
        for number, job in enumerate(jobs):
            yield number, done(context, job)

    yield work


@contextmanager
def _in_processes(search: Search, context: RunContext) -> Iterator[_Work]:
    desk = Desk.of(context, search.workers)
    # Spawned: a forked child would inherit torch's threads, which do not survive a fork.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(search.workers, mp_context=spawning) as pool:

        def work(jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
            waiting = {pool.submit(desk.work, job): number for number, job in enumerate(jobs)}
            try:
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
            finally:  # whoever asked may have had enough
                for future in waiting:
                    future.cancel()

        try:
            yield work
        except BrokenProcessPool:
            raise StageError(
                "search  workers",
                f"one of {search.workers} worker processes was killed, as for want of memory",
                "write fewer `workers`; what was finished is kept, go on with\n  "
                f"{context.command}",
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _of_ray(error: Exception, label: str, command: str) -> Exception:
    """What a Ray worker came to: its own error, or that it is gone, and in Ray's words why."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, PruneExportError):
        return cause
    if cause is not None:
        said = f"failed on a Ray worker: {type(cause).__name__}: {cause}"
    else:
        # A worker that was killed or crashed, a node that is lost or out of memory.
        lines = " ".join(str(error).split())
        said = f"was lost with its Ray worker: {type(error).__name__}: {lines:.300}"
    return StageError(
        f"search  {label}",
        said,
        "where memory ran out, write fewer `workers`; what was finished is kept, go on with\n  "
        f"{command}",
    )


@contextmanager
def _on_ray(search: Search, context: RunContext) -> Iterator[_Work]:
    """Runs jobs on the Ray cluster that `RAY_ADDRESS` names, or on one started here."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra.of("search: executor ray", "ray", "ray") from error
    own = not ray.is_initialized()
    if own:
        here = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": context.machine.threads}
        ray.init(include_dashboard=False, log_to_driver=False, **here)
    desk = Desk.of(context, search.workers)
    threads = desk.machine.threads
    remote = ray.remote(num_cpus=threads, max_retries=0)(Desk.work)
    room = int(ray.cluster_resources().get("CPU", 1)) // threads

    def work(jobs: Sequence[Job]) -> Iterator[tuple[int, Done]]:
        coming = iter(enumerate(jobs))
        waiting: dict[object, int] = {}

        def start() -> None:
            if (following := next(coming, None)) is not None:
                waiting[remote.remote(desk, following[1])] = following[0]

        for _ in range(max(1, min(search.workers, room))):
            start()
        while waiting:
            (first,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(first)
            try:
                result = ray.get(first)
            except ray.exceptions.RayError as error:
                raise _of_ray(error, jobs[number].label, context.command) from None
            start()
            yield number, result

    try:
        yield work
    finally:
        if own:
            ray.shutdown()
