"""Code that does not end is stopped, and what ends in time is not touched."""

from __future__ import annotations

import threading

import pytest

from prune_export.system.bounded import TookTooMuch, bounded


def for_ever() -> None:
    while True:
        pass


def test_what_does_not_end_is_stopped() -> None:
    with pytest.raises(TookTooMuch), bounded(0.05):
        for_ever()


def test_what_fills_the_memory_is_stopped() -> None:
    held: list[bytes] = []
    with pytest.raises(TookTooMuch), bounded(60, 100 << 20):
        while True:
            held.append(bytes(range(256)) * 4096)
    assert len(held) < 5000


def test_what_ends_in_time_is_left_alone_and_so_is_what_comes_after() -> None:
    for _ in range(50):
        with bounded(20):
            pass
    assert sum(range(100_000)) == 4_999_950_000
    assert threading.active_count() < 10


def test_other_threads_are_bounded_by_themselves() -> None:
    found: list[str] = []

    def work() -> None:
        try:
            with bounded(0.05):
                for_ever()
        except TookTooMuch:
            found.append("stopped")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["stopped"]
