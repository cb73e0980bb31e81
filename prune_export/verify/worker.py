"""The process that holds one engine: `python -m prune_export.verify.worker`.

Requests come as JSON lines on standard input and are answered on standard output, one line each:
`{"result": …}` or `{"error": …}`, with `{"advance": n}` lines before it while long work goes on.
Arrays travel as .npy files that the parent names. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from prune_export.contracts import PlacesNodes, Runner
from prune_export.errors import PruneExportError
from prune_export.machine import Machine
from prune_export.sampling import Sampling
from prune_export.verify import drive
from prune_export.verify.engine import Engine


class Worker:
    """Answers requests about one engine; `say` sends a line to the parent."""

    def __init__(self, say: Callable[[dict[str, Any]], None]) -> None:
        self._say = say
        self._stack = ExitStack()
        self._runner: Runner | None = None

    def answer(self, command: str, arguments: dict[str, Any]) -> Any:
        return getattr(self, f"do_{command}")(**arguments)

    def close(self) -> None:
        self._stack.close()

    def _advance(self, steps: int) -> None:
        self._say({"advance": steps})

    @property
    def _opened(self) -> Runner:
        if self._runner is None:
            raise RuntimeError("the first request must be `open`")
        return self._runner

    def do_open(self, engine: dict[str, Any], machine: dict[str, Any]) -> int:
        """Opens the engine; gives the size of its vocabulary, found by one warm-up step."""
        runner = Engine.from_json(engine).open(Machine(**machine))
        self._runner = self._stack.enter_context(runner)
        logits, _ = runner.step(np.zeros((1, 1), dtype=np.int64))
        runner.reset()
        return int(logits.shape[-1])

    def do_time(self, ids: list[list[int]], prompt: int) -> tuple[float, float]:
        return drive.time_once(self._opened, np.array(ids, dtype=np.int64), prompt)

    def do_placement(self) -> dict[str, Any] | None:
        runner = self._opened
        return asdict(runner.placement()) if isinstance(runner, PlacesNodes) else None

    def do_losses(self, ids_file: str, counted_file: str | None = None) -> list[float]:
        counted = _load(counted_file) if counted_file else None
        return drive.window_losses(self._opened, _load(ids_file), self._advance, counted=counted)

    def do_cached_logits(self, ids_file: str, steps: int, out_file: str) -> None:
        np.save(out_file, drive.cached_logits(self._opened, _load(ids_file), steps))

    def do_greedy(self, prompt: list[int], new: int, out_file: str) -> list[int]:
        teacher = drive.greedy(self._opened, np.array(prompt, dtype=np.int64), new)
        np.save(out_file, teacher.logits)
        return [int(token) for token in teacher.tokens]

    def do_continuations(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return drive.continuations(self._opened, prompts, new, self._advance)

    def do_drawn(
        self,
        prompts: list[list[int]],
        new: int,
        temperature: float,
        top_p: float,
        seeds: list[int],
        ends: list[int],
    ) -> list[list[int]]:
        how = Sampling(temperature, top_p)
        return drive.drawn(
            self._opened, prompts, new, self._advance, how=how, seeds=seeds, ends=frozenset(ends)
        )


def _load(file: str) -> np.ndarray:
    loaded: np.ndarray = np.load(file, allow_pickle=False)
    return loaded


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answers line by line until `requests` ends."""

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    worker = Worker(say)
    try:
        for line in requests:
            request = json.loads(line)
            try:
                say({"result": worker.answer(request["command"], request["arguments"])})
            except PruneExportError as error:
                said = [error.where, error.problem, error.fix]
                say({"error": {"kind": type(error).__name__, "lines": said}})
            except Exception:  # the parent must hear of anything; it raises it
                say({"error": {"kind": "", "lines": [traceback.format_exc()]}})
    finally:
        worker.close()


def die_with_parent() -> None:
    """Makes the kernel end this process when its parent ends, even by SIGKILL and even if stopped.

    Linux only; elsewhere the closed pipe ends it.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def main() -> None:
    """Answers the parent's requests until it closes the pipe."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
