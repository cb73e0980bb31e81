"""The one thread that runs the engine, and the bounded queue before it.

An answer is put into its own asyncio queue, which holds at most as many pieces as tokens were asked
for: a slow reader keeps nobody waiting. Who goes away is taken out of the queue, or stops the
engine at the next token.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from prune_export_server.generation import Cancelled, Chosen, Generator, Sampling
from prune_export_server.text import Detokenizer, Stopper

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that is whole, and the tokens that came meanwhile."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Done:
    """The end of an answer: why, and how many tokens were generated."""

    finish: Finish
    generated: int


@dataclass(frozen=True)
class Failed:
    """An answer that does not come: `late` where its time was over, else what went wrong."""

    late: bool
    problem: str


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A prompt, how to answer it, and where the answer goes; None there: the client has gone."""

    ids: Sequence[int]
    sampling: Sampling
    stops: Sequence[str]
    deadline: float
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)
    gone: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.monotonic)

    def tell(self, event: Event) -> None:
        """Hands an event to the event loop; does nothing once that is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Full(Exception):
    """The queue has no room."""


class Worker:
    """Runs jobs one after the other, in the order in which they came."""

    def __init__(
        self,
        opened: Callable[[], tuple[Generator, Any]],
        *,
        most_waiting: int,
        told: Callable[[str, float], None] = lambda name, value: None,
    ) -> None:
        self._opened = opened
        self._most = most_waiting
        self._told = told
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._running: Job | None = None
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._longest: int | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> int | None:
        """Opens the engine in its thread; gives the longest sequence that it takes, None: any.

        Raises:
            BaseException: what opening it raised.
        """
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            raise self._error
        return self._longest

    def close(self, seconds: float = 10.0) -> None:
        """Ends the thread after the job at hand."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        """The jobs in the queue."""
        return len(self._waiting)

    @property
    def most_waiting(self) -> int:
        """The jobs for which the queue has room."""
        return self._most

    @property
    def busy(self) -> bool:
        """Whether a job is being answered."""
        return self._running is not None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all jobs of a request into the queue, or none.

        Raises:
            Full: there is no room for all of them.
        """
        with self._changed:
            if self._closing or len(self._waiting) + len(jobs) > self._most:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forgets a job: at once where it waits, at the next token where it runs."""
        job.gone.set()
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)

    def _run(self) -> None:
        try:
            generator, tokenizer = self._opened()
            self._longest = generator.longest
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        try:
            self._serve(generator, tokenizer)
        finally:
            generator.close()

    def _serve(self, generator: Generator, tokenizer: Any) -> None:
        while (job := self._next()) is not None:
            self._running = job
            try:
                self._answer(job, generator, tokenizer)
            except Cancelled:
                late = not job.gone.is_set()
                self._told("late" if late else "cancelled", 1)
                job.tell(Failed(late, "the time for this request is over"))
            except Exception as error:  # one bad request must not take the others along
                self._told("failed", 1)
                job.tell(Failed(False, f"{type(error).__name__}: {error}"))
            finally:
                self._running = None

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._closing else None

    def _answer(self, job: Job, generator: Generator, tokenizer: Any) -> None:
        def stopped() -> bool:
            return job.gone.is_set() or time.monotonic() > job.deadline

        prompt, logits = generator.prompt(job.ids, job.sampling, stopped)
        self._told("prompt_tokens", len(job.ids))
        if prompt:
            job.tell(Piece("", tuple(prompt)))
        words, stopper = Detokenizer(tokenizer, job.ids), Stopper(job.stops)
        count, began = 0, time.monotonic()
        for chosen in generator.continuation(logits, job.sampling, stopped):
            if not count:
                self._told("first_token_seconds", time.monotonic() - job.arrived)
            count += 1
            job.tell(Piece(stopper.add(words.add(chosen.token)), (chosen,)))
            if stopper.met:
                break
        rest = "" if stopper.met else stopper.add(words.finish())
        rest += "" if stopper.met else stopper.finish()
        if rest:
            job.tell(Piece(rest))
        self._told("generated_tokens", count)
        self._told("generation_seconds", time.monotonic() - began)
        whole = stopper.met or count < job.sampling.max_tokens
        job.tell(Done("stop" if whole else "length", count))
