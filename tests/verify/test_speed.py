from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prune_export.errors import StageError, VerifyError
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe.stages import Workload
from prune_export.verify.compare import compare
from prune_export.verify.engine import Engine
from prune_export.verify.results import Speed
from prune_export.verify.speed import Effort, measure_speed, tokens_of

SHORT = Effort(launches=3, rounds=2, most_launches=3, seconds=1000)


def launches(seconds: list[float], rounds: list[int]) -> list[np.ndarray]:
    return np.split(np.array(seconds), np.cumsum(rounds)[:-1])


def check_figures(speed: Speed) -> None:
    """Every figure follows from the raw samples that stand beside it."""
    raw = (speed.dense_seconds, speed.again_seconds, speed.pruned_seconds)
    found = compare(*(launches(seconds, speed.rounds) for seconds in raw))
    assert (found.ratio, found.low, found.high) == (speed.ratio, speed.low, speed.high)
    assert (found.floor_low, found.floor_high) == (speed.floor_low, speed.floor_high)
    assert found.verdict == speed.verdict
    tokens = speed.workload.batch * (speed.workload.prompt if speed.phase == "prefill" else 1)
    assert speed.dense_tokens_per_second == pytest.approx(tokens / np.median(raw[0]))
    assert speed.pruned_tokens_per_second == pytest.approx(tokens / np.median(raw[2]))


def test_tokens_in_reading_order_and_over_again() -> None:
    ids = np.arange(6).reshape(2, 3)
    expected = [[0, 1, 2, 3, 4], [5, 0, 1, 2, 3]]
    assert tokens_of(Workload(batch=2, prompt=3, new=2), ids).tolist() == expected


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_interleaves_engines_in_processes(
    tiny_graph: Path, machine: Machine, ids: np.ndarray
) -> None:
    dense = Engine("onnx", tiny_graph.parent, weight_bytes=300)
    pruned = Engine("onnx", tiny_graph.parent, weight_bytes=200)
    workloads = [Workload(1, 8, 2), Workload(2, 16, 1)]
    found = measure_speed(dense, pruned, workloads, ids, machine, name="portable", effort=SHORT)
    assert [(speed.workload, speed.phase) for speed in found] == [
        (workload, phase) for workload in workloads for phase in ("prefill", "decode")
    ]
    for speed in found:
        assert speed.engine == "portable"
        assert speed.rounds == [2, 2, 2]
        assert speed.bound == 1.5
        assert min(speed.dense_seconds + speed.again_seconds + speed.pruned_seconds) > 0
        check_figures(speed)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_takes_turns_where_memory_is_short(
    tiny_graph: Path, machine: Machine, ids: np.ndarray
) -> None:
    """Three engines do not fit, one does: each sample then has its own process."""
    one = sum(file.stat().st_size for file in tiny_graph.parent.glob("*"))
    engine = Engine("onnx", tiny_graph.parent)
    short = replace(machine, ram_bytes=4 * one)
    effort = replace(SHORT, rounds=3)
    found = measure_speed(engine, engine, [Workload(1, 4, 1)], ids, short, effort=effort)
    for speed in found:
        assert speed.rounds == [1, 1, 1]
        check_figures(speed)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_an_engine_that_dies_ends_the_measurement(
    tiny_graph: Path, tmp_path: Path, machine: Machine, ids: np.ndarray
) -> None:
    dense, broken = Engine("onnx", tiny_graph.parent), Engine("onnx", tmp_path)
    with pytest.raises(StageError, match="does not load it"):
        measure_speed(dense, broken, [Workload(1, 4, 1)], ids, machine, effort=SHORT)


@pytest.mark.parametrize(("device", "steps"), [("cpu", 4), ("cuda", 9)])
def test_what_is_timed_on_a_gpu_has_run_before(
    device: Any, steps: int, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without processes: a stand-in that records what it is fed."""
    fed: list[int] = []

    class Recorder:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Any:
            fed.clear()
            return self

        def __exit__(self, *_: Any) -> None: ...
        def ready(self) -> int:
            return 256

        def time(self, ids: np.ndarray, prompt: int) -> tuple[float, float]:
            fed.append(ids.shape[1] - prompt)
            return 1.0, 1.0

    monkeypatch.setattr("prune_export.verify.speed.Session", Recorder)
    engine = Engine.pytorch(tmp_path)
    on = replace(machine, device=device, gpu_bytes=1 << 30)
    measure_speed(engine, engine, [Workload(1, 4, 9)], np.arange(64), on, effort=SHORT)
    assert fed == [steps] * 3 + [9] * 3 * SHORT.rounds


def test_progress_ends_at_all_launches(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where launches take longer than they should, and where more than these are needed."""
    told: list[tuple[float | None, list[float]]] = []
    noise = np.random.default_rng(0)

    class Quick:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def ready(self) -> int:
            return 256

        def time(self, ids: np.ndarray, prompt: int) -> tuple[float, float]:
            return 1.0, float(noise.random())

    class Heard(Silent):
        @contextmanager
        def task(self, label: str, total: float | None = None) -> Iterator[Any]:
            done: list[float] = []
            told.append((total, done))
            yield SimpleNamespace(advance=done.append, note=print)

    monkeypatch.setattr("prune_export.verify.speed.Session", Quick)
    engine = Engine.pytorch(tmp_path)
    for seconds in (0.0, 60.0):
        effort = replace(SHORT, rounds=3, launches=2, most_launches=5, seconds=seconds)
        workloads = [Workload(1, 4, 1)]
        measure_speed(
            engine, engine, workloads, np.arange(64), machine, effort=effort, progress=Heard()
        )
    assert [total for total, _ in told] == [2, 2]
    assert [sum(done) for _, done in told] == pytest.approx([2, 2])
    assert len(told[0][1]) < len(told[1][1])


@pytest.mark.parametrize(
    ("startup", "each", "launches", "rounds", "says"),
    [
        (99.0, 1.0, 3, 1, "take about 5 min 00 s here, not 30 s: one takes 1 min 40 s"),
        (8.0, 1.0, 3, 1, None),
        (2.0, 1.0, 5, 4, None),
        (1.0, 0.5, 5, 4, None),
    ],
)
def test_time_that_is_too_short_ends_at_the_fewest_launches(
    startup: float,
    each: float,
    launches: int,
    rounds: int,
    says: str | None,
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that starting and timing engines moves: 30 s are asked for."""
    now, started, told, done = [0.0], [0], [], []

    class Slow:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Any:
            started[0] += 1
            now[0] += startup / 3
            return self

        def __exit__(self, *_: Any) -> None: ...
        def ready(self) -> int:
            return 256

        def time(self, ids: np.ndarray, prompt: int) -> tuple[float, float]:
            now[0] += each / 6
            return 1.0, 1.0

    class Heard(Silent):
        @contextmanager
        def task(self, label: str, total: float | None = None) -> Iterator[Any]:
            yield SimpleNamespace(advance=done.append, note=print)

        def say(self, text: str) -> None:
            told.append(text)

    monkeypatch.setattr("prune_export.verify.speed.Session", Slow)
    engine = Engine.pytorch(tmp_path)
    effort = Effort(seconds=30.0)
    found = measure_speed(
        engine, engine, [Workload(1, 4, 1)], np.arange(64), machine, effort=effort,
        progress=Heard(), clock=lambda: now[0],
    )  # fmt: skip
    assert started[0] == 3 * launches
    assert len(found[0].rounds) == launches
    assert max(found[0].rounds) == rounds
    assert found[0].low <= found[0].ratio <= found[0].high
    assert sum(done) == pytest.approx(effort.launches)
    assert [says in text for text in told] == ([True] if says else [])


@pytest.mark.parametrize("workload", [Workload(0, 4, 1), Workload(1, 0, 1), Workload(1, 4, 0)])
def test_empty_workloads_are_refused(
    tiny: Path, machine: Machine, ids: np.ndarray, workload: Workload
) -> None:
    engine = Engine.pytorch(tiny)
    with pytest.raises(VerifyError, match="below 1"):
        measure_speed(engine, engine, [workload], ids, machine)


def test_no_tokens_are_refused(tiny: Path, machine: Machine) -> None:
    engine = Engine.pytorch(tiny)
    with pytest.raises(VerifyError, match="no token ids"):
        measure_speed(engine, engine, [Workload(1, 4, 1)], np.array([]), machine)
