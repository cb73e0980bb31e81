"""Choosing tokens: the same as by sorting the whole vocabulary, at any temperature."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("prune_export_server.generation")

from prune_export_server.generation import Generator, Sampling, _nucleus, sample
from prune_export_server.worker import Worker

from tests.integrations.server.conftest import Gated


@given(some.integers(0, 2**32), some.floats(1e-3, 0.999), some.sampled_from([0.01, 1.0, 30.0]))
def test_the_nucleus_is_that_of_the_whole_sorted_vocabulary(
    seed: int, top_p: float, spread: float
) -> None:
    random = np.random.default_rng(seed)
    weights = np.exp(np.round(random.normal(0, spread, 5000), 2))  # some are equal
    order = np.argsort(-weights, kind="stable")
    total = np.cumsum(weights[order])
    keep = int(np.searchsorted(total, top_p * weights.sum())) + 1
    found, sums = _nucleus(weights, top_p)
    assert found.tolist() == order[:keep].tolist()
    np.testing.assert_array_equal(sums, total[:keep])


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-6])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = np.array([1.0, 4.0, 3.9], np.float32)
    random = np.random.default_rng(0)
    assert sample(logits, Sampling(1, temperature=temperature), random) == 1


def test_the_engine_is_freed_when_its_thread_ends() -> None:
    class Counted(Gated):
        freed = 0

        def __exit__(self, *of: object) -> None:
            self.freed += 1

    engine = Counted()
    worker = Worker(
        lambda: (Generator(engine, [257], 64), None),  # type: ignore[arg-type]
        most_waiting=1,
    )
    worker.start()
    worker.close()
    assert engine.freed == 1
