"""What comes of a job while it comes: its events, and the streamed answer that is made of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

from starlette.requests import Request

from prune_export_server.answers import Form, usage_of
from prune_export_server.refused import Refused
from prune_export_server.worker import Done, Event, Failed, Job, Worker

_WRITE_SECONDS: Final = 60.0
"""How long after its time a stream may still be read; then its connection is closed."""


async def gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events_of(
    job: Job, watch: asyncio.Task[None], worker: Worker
) -> AsyncGenerator[Event, None]:
    """What the engine says of a job, until its end, its time or that of the client's patience.

    One queue brings all three, so that a token costs the event loop no task and no timer.
    """

    def late() -> None:
        worker.cancel(job)
        job.events.put_nowait(Failed(True, "the time for this request is over"))

    def left(_: asyncio.Task[None]) -> None:
        job.events.put_nowait(None)

    seconds = max(job.deadline + 1 - time.monotonic(), 0.01)
    timer = asyncio.get_running_loop().call_later(seconds, late)
    watch.add_done_callback(left)
    try:
        while (event := await job.events.get()) is not None:
            yield event
            if isinstance(event, Done | Failed):
                return
    finally:
        timer.cancel()
        watch.remove_done_callback(left)


class Streamed:
    """A streamed answer: server-sent events, ended early where the client goes."""

    status_code = 200

    def __init__(self, worker: Worker, jobs: Sequence[Job], form: Form, *, usage: bool) -> None:
        self._worker, self._jobs, self._form, self._usage = worker, jobs, form, usage

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        watch = asyncio.create_task(gone(Request(scope, receive)))
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        # By then all was generated: who does not read it keeps a connection for nothing.
        limit = max(job.deadline for job in self._jobs) - time.monotonic() + _WRITE_SECONDS
        try:
            async with asyncio.timeout(limit), aclosing(self._lines(watch)) as lines:
                await send(start)
                async for line in lines:
                    await send({"type": "http.response.body", "body": line, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the client went while it was written to, or does not read: TimeoutError
            pass
        finally:
            watch.cancel()
            for job in self._jobs:
                self._worker.cancel(job)

    async def _lines(self, watch: asyncio.Task[None]) -> AsyncGenerator[bytes, None]:
        form, generated = self._form, 0
        for index, job in enumerate(self._jobs):
            first, offset = True, 0
            if job.sampling.echo:
                text = form.words.decoded(job.ids)
                yield _event(form.chunk([form.delta(index, text, (), None, first=True, offset=0)]))
            async with aclosing(events_of(job, watch, self._worker)) as events:
                async for event in events:
                    if isinstance(event, Failed):
                        yield _event(Refused(504 if event.late else 500, event.problem).body())
                        return
                    finish = event.finish if isinstance(event, Done) else None
                    text = "" if isinstance(event, Done) else event.text
                    tokens = () if isinstance(event, Done) else event.tokens
                    if isinstance(event, Done):
                        generated += event.generated
                    elif not (text or (form.logprobs and tokens) or first):
                        continue
                    delta = form.delta(index, text, tokens, finish, first=first, offset=offset)
                    yield _event(form.chunk([delta]))
                    first = False
                    if form.logprobs:
                        offset += sum(form.words.length(one.token) for one in tokens)
            if watch.done():
                return
        if self._usage:
            total = usage_of(sum(len(job.ids) for job in self._jobs), generated)
            yield _event(form.chunk([], total))
        yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
