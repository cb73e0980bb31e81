import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from prune_export.errors import StageError, VerifyError
from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.session import Session, environment


@pytest.fixture(scope="module")
def session(tiny: Path, machine: Machine) -> Iterator[Session]:
    with Session(Engine.pytorch(tiny), machine) as opened:
        yield opened


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of(session: Session) -> int:
    return session._process.pid


@pytest.mark.slow
def test_answers_and_rests(session: Session, ids: np.ndarray) -> None:
    assert session.ready() == 256
    prefill, decode = session.time(ids, 40)
    assert prefill > 0
    assert decode > 0
    eventually(lambda: psutil.Process(pid_of(session)).status() == psutil.STATUS_STOPPED)


@pytest.mark.slow
def test_arrays_stay_readable(session: Session, ids: np.ndarray) -> None:
    """A later answer does not overwrite an earlier one."""
    first = session.cached_logits(ids, 3)
    copy = np.array(first)
    session.cached_logits(ids[::-1], 3)
    np.testing.assert_array_equal(first, copy)


@pytest.mark.slow
def test_errors_cross_the_pipe_as_themselves(session: Session) -> None:
    with pytest.raises(VerifyError, match="empty prompt"):
        session.continuations([[]], 3)
    assert len(session.continuations([[1, 2]], 3)[0]) == 3


@pytest.mark.slow
def test_says_how_the_process_died(tiny_graph: Path, machine: Machine, ids: np.ndarray) -> None:
    with Session(Engine("onnx", tiny_graph.parent), machine) as session:
        session.ready()
        os.kill(pid_of(session), signal.SIGKILL)
        with pytest.raises(StageError, match="ended by signal SIGKILL"):
            session.losses(ids)


@pytest.mark.slow
def test_unloadable_engine_says_why(tmp_path: Path, machine: Machine) -> None:
    with (
        pytest.raises(StageError, match=r"nowhere(.|\n)*Traceback"),
        Session(Engine.pytorch(tmp_path / "nowhere"), machine) as session,
    ):
        session.ready()


def test_hung_process_is_given_up(tiny: Path, machine: Machine) -> None:
    with (
        pytest.raises(StageError, match=r"did not answer for 0\.01 s"),
        Session(Engine.pytorch(tiny), machine, timeout_seconds=0.01) as session,
    ):
        session.ready()


def test_threads_of_workers_sleep(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    variables = environment(machine)
    assert variables["OMP_WAIT_POLICY"] == "PASSIVE"
    assert variables["GOMP_SPINCOUNT"] == "0"
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["HF_HUB_OFFLINE"] == "1"


ORPHANING = """
import sys, time
from pathlib import Path
from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.session import Session
with Session(Engine("onnx", Path(sys.argv[1])), Machine("cpu", 1 << 32, 0, 1)) as session:
    session.ready()
    print(session._process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_worker_ends_with_a_killed_parent(tiny_graph: Path, machine: Machine) -> None:
    """Even though it is stopped, and so can't see that the pipe was closed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANING, str(tiny_graph.parent)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(machine),
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_tokens_that_the_engine_lacks_are_refused(session: Session, ids: np.ndarray) -> None:
    """Before they are looked up in its embedding; the process lives on."""
    beyond = ids.copy()
    beyond[1, 2] = 256
    requests: list[Callable[[], object]] = [
        lambda: session.losses(beyond),
        lambda: session.cached_logits(beyond, 3),
        lambda: session.time(beyond, 40),
        lambda: session.greedy(beyond[1], 2),
        lambda: session.continuations([[1, 2], [256]], 2),
    ]
    for request in requests:
        with pytest.raises(VerifyError, match="got token id 256, but the model knows 256 ids"):
            request()
    assert len(session.losses(ids)) == len(ids)
