"""The queue before the engine: its bound, cancelled and late requests, and faults."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.server.conftest import Gated

pytest.importorskip("prune_export_server.worker")

from prune_export_server.generation import Generator, Sampling
from prune_export_server.worker import Done, Event, Failed, Full, Job, Worker

from prune_export.plugins import load_tokenizer


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    thread = threading.Thread(target=found.run_forever)
    thread.start()
    yield found
    found.call_soon_threadsafe(found.stop)
    thread.join()
    found.close()


@pytest.fixture
def gated() -> Gated:
    return Gated()


@pytest.fixture
def told() -> dict[str, float]:
    return {}


@pytest.fixture
def worker(gated: Gated, told: dict[str, float], tiny_llama: Path) -> Iterator[Worker]:
    def count(name: str, value: float) -> None:
        told[name] = told.get(name, 0) + value

    def opened() -> tuple[Generator, Any]:
        return Generator(gated, [257], 64), load_tokenizer(tiny_llama)  # type: ignore[arg-type]

    found = Worker(opened, most_waiting=2, told=count)
    assert found.start() == 64
    gated.began.get(timeout=60)  # the step by which it sees what the engine gives
    yield found
    gated.let(1000)
    found.close()
    assert not found.alive


def job(loop: asyncio.AbstractEventLoop, *, new: int = 3, seconds: float = 600, **more: Any) -> Job:
    return Job([70, 71], Sampling(new, temperature=0), more.pop("stops", ()),
               time.monotonic() + seconds, loop, **more)  # fmt: skip


def answer(one: Job) -> list[Event]:
    async def read() -> list[Event]:
        found = []
        while True:
            found.append(await one.events.get())
            if isinstance(found[-1], Done | Failed):
                return found

    return asyncio.run_coroutine_threadsafe(read(), one.loop).result(timeout=60)


def test_prompts_are_answered_in_order_and_the_queue_is_bounded(
    worker: Worker, gated: Gated, loop: asyncio.AbstractEventLoop
) -> None:
    first, second, third, fourth = (job(loop) for _ in range(4))
    worker.submit([first])
    gated.began.get(timeout=60)
    worker.submit([second, third])
    with pytest.raises(Full):
        worker.submit([fourth])
    assert worker.waiting == 2
    worker.cancel(second)
    worker.submit([fourth])
    gated.let(100)
    for one in (first, third, fourth):
        assert answer(one)[-1] == Done("length", 3)
    assert second.events.empty()


def test_who_goes_stops_the_engine_at_the_next_token(
    worker: Worker, gated: Gated, told: dict[str, float], loop: asyncio.AbstractEventLoop
) -> None:
    one, other = job(loop, new=50), job(loop)
    worker.submit([one, other])
    gated.began.get(timeout=60)
    gated.let(2)
    gated.began.get(timeout=60)
    worker.cancel(one)
    gated.let(100)
    assert answer(one)[-1] == Failed(False, "the time for this request is over")
    assert answer(other)[-1] == Done("length", 3)
    assert told["cancelled"] == 1
    assert told["generated_tokens"] == 3


def test_a_request_whose_time_is_over_ends(
    worker: Worker, gated: Gated, told: dict[str, float], loop: asyncio.AbstractEventLoop
) -> None:
    late = job(loop, seconds=-1)
    worker.submit([late])
    assert isinstance(answer(late)[-1], Failed)
    assert told["late"] == 1


def test_an_end_token_and_a_stop_string_end_an_answer(
    worker: Worker, gated: Gated, loop: asyncio.AbstractEventLoop
) -> None:
    gated.let(1000)
    ended = Job([255], Sampling(9, temperature=0), (), time.monotonic() + 60, loop)
    worker.submit([ended])
    assert answer(ended)[-1] == Done("stop", 1)  # 256, then 257 which is an end
    plain, stopped = job(loop, new=6), job(loop, new=6)
    worker.submit([plain])
    text = "".join(event.text for event in answer(plain)[:-1])  # type: ignore[union-attr]
    stopped.stops = (text[2:4],)
    worker.submit([stopped])
    events = answer(stopped)
    assert "".join(event.text for event in events[:-1]) == text[:2]  # type: ignore[union-attr]
    assert events[-1] == Done("stop", 4)


def test_a_fault_of_one_request_does_not_take_the_next_along(
    worker: Worker, gated: Gated, loop: asyncio.AbstractEventLoop
) -> None:
    gated.let(1000)
    broken, fine = job(loop), job(loop)
    broken.ids = [10**6]
    broken.sampling = Sampling(3, temperature=float("nan"), top_p=-1.0)
    worker.submit([broken, fine])
    assert isinstance(answer(broken)[-1], Done | Failed)
    assert answer(fine)[-1] == Done("length", 3)


def test_what_opening_raises_is_raised_where_it_was_asked_for() -> None:
    def broken() -> tuple[Any, Any]:
        raise ValueError("no engine")

    with pytest.raises(ValueError, match="no engine"):
        Worker(broken, most_waiting=1).start()
