"""Engines and reloads in the tests' own process, for tests of what is done with their answers.

A process that holds a checkpoint imports torch and transformers: four processor seconds, and a run
starts up to a dozen. Here the worker's own loop answers the same requests in a thread, and the
check of a reload is called. That they are processes of their own, and what follows from it, is
shown by tests/verify/test_session.py, test_speed.py and test_reload.py, and whole runs with real
processes by tests/execution/test_run.py and tests/cli/test_encodings.py.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from prune_export.machine import Machine
from prune_export.verify.reload import _brings_our_code
from prune_export.verify.reload_child import check
from prune_export.verify.worker import serve

_ONE_AT_A_TIME = threading.Lock()
"""Loading a model sets the default dtype of all threads."""


class Thread:
    """What `Session` asks of a process: two pipes and an end."""

    def __init__(self, command: list[str], *, stderr: Any, **_: Any) -> None:
        assert command[-1] == "prune_export.verify.worker"
        del stderr
        self.command = command
        self.returncode: int | None = None
        asked, self._ask = os.pipe()
        self._answers, answers = os.pipe()
        self.stdin = os.fdopen(self._ask, "wb")
        self.stdout = os.fdopen(self._answers, "rb", 0)
        requests = os.fdopen(asked, encoding="utf-8")
        self._thread = threading.Thread(
            target=_serve, args=(requests, os.fdopen(answers, "w", encoding="utf-8")), daemon=True
        )
        self._thread.start()

    def send_signal(self, number: int) -> None:
        """It rests anyway: it waits for its next request."""

    def wait(self, timeout: float | None = None) -> int:
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise subprocess.TimeoutExpired(self.command, timeout or 0)
        self.returncode = 0
        return 0

    def kill(self) -> None:
        """A thread ends when its last request is answered."""


def _serve(requests: IO[str], answers: IO[str]) -> None:
    with requests, answers:
        serve(_taken(requests), answers)  # type: ignore[arg-type]


def _taken(requests: IO[str]) -> Iterator[str]:
    for line in requests:
        with _ONE_AT_A_TIME:
            yield line


def reloaded(checkpoint: Path, machine: Machine) -> dict[str, Any]:
    found = check(checkpoint, machine.ram_bytes, own_code=_brings_our_code(checkpoint))
    return {**found, "foreign": []}


def install(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "prune_export.verify.session.subprocess",
        SimpleNamespace(
            Popen=Thread, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
        ),
    )
    patch.setattr("prune_export.verify.reload._run", reloaded)
