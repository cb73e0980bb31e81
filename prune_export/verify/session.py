"""Runs one engine in a process of its own, idle unless asked: the parent's side of a worker."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

import prune_export
from prune_export import errors
from prune_export.errors import PruneExportError, StageError, VerifyError
from prune_export.machine import Machine
from prune_export.progress import Task
from prune_export.sampling import Sampling
from prune_export.system.platforms import resume, suspend
from prune_export.system.temporary import Temporary
from prune_export.verify.engine import Engine

TIMEOUT_SECONDS: Final = 1800.0
"""How long a worker may be silent before it is taken for hung."""
_TAIL_LINES: Final = 20


class Session:
    """An engine in its own process; enter it to start, leave it to end the process.

    The process starts at once and opens the engine while the caller starts others; the first
    request waits for it. Between requests the process is stopped (SIGSTOP), so that no thread pool
    of an idle engine can spin beside the one that is being timed.

    Raises:
        StageError: from any request, when the process died or hangs; it ends with its last words.
        PruneExportError: the one that the worker raised.
    """

    def __init__(
        self, engine: Engine, machine: Machine, *, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        self.engine = engine
        self._machine = machine
        self._timeout = timeout_seconds
        self._buffer = b""
        self._vocabulary: int | None = None
        self._saved = 0

    def __enter__(self) -> Self:
        self._files = Temporary()
        self._log = self._files.path / "stderr"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prune_export.verify.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(self._machine),
            )
        try:
            self._send("open", {"engine": self.engine.to_json(), "machine": asdict(self._machine)})
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def release(self) -> None:
        """Ends the process and frees its memory; its arrays stay until the session ends."""
        if self._process.returncode is None:
            self._stop()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def ready(self) -> int:
        """Waits until the engine is open; gives the size of its vocabulary."""
        if self._vocabulary is None:
            self._vocabulary = int(self._receive(None))
            self._pause()
        return self._vocabulary

    def time(self, ids: np.ndarray, prompt: int) -> tuple[float, float]:
        """Seconds for the prompt and for a decoding step: `drive.time_once`."""
        self._refuse_unknown(ids)
        prefill, decode = self._ask("time", {"ids": ids.tolist(), "prompt": prompt})
        return float(prefill), float(decode)

    def placement(self) -> Mapping[str, Any] | None:
        """The runner's `Placement` as a mapping; None where its runtime has no providers."""
        found: Mapping[str, Any] | None = self._ask("placement", {})
        return found

    def losses(
        self, ids: np.ndarray, task: Task | None = None, counted: np.ndarray | None = None
    ) -> list[float]:
        """`drive.window_losses`; advances `task` by one a window."""
        arguments = {"ids_file": self._save(ids)}
        if counted is not None:
            arguments["counted_file"] = self._file("counted.npy")
            np.save(arguments["counted_file"], counted)
        return [float(loss) for loss in self._ask("losses", arguments, task)]

    def cached_logits(self, ids: np.ndarray, steps: int) -> np.ndarray:
        """`drive.cached_logits`, mapped from a file that this session owns until it ends."""
        out = self._file("logits.npy")
        arguments = {"ids_file": self._save(ids), "steps": steps, "out_file": out}
        self._ask("cached_logits", arguments)
        return _mapped(out)

    def greedy(self, prompt: np.ndarray, new: int) -> tuple[np.ndarray, np.ndarray]:
        """`drive.greedy`: tokens int64 `[new]` and the logits that they were chosen from."""
        self._refuse_unknown(prompt)
        out = self._file("greedy.npy")
        tokens = self._ask("greedy", {"prompt": prompt.tolist(), "new": new, "out_file": out})
        return np.array(tokens, dtype=np.int64), _mapped(out)

    def continuations(
        self, prompts: Sequence[Sequence[int]], new: int, task: Task | None = None
    ) -> list[list[int]]:
        """`drive.continuations`; advances `task` by one a step."""
        listed = [list(prompt) for prompt in prompts]
        self._refuse_unknown(np.array([token for prompt in listed for token in prompt]))
        said = self._ask("continuations", {"prompts": listed, "new": new}, task)
        return [[int(token) for token in tokens] for tokens in said]

    def drawn(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        *,
        how: Sampling,
        seeds: Sequence[int],
        ends: Collection[int] = (),
        task: Task | None = None,
    ) -> list[list[int]]:
        """`drive.drawn`; advances `task` by the number of texts at each step."""
        listed = [list(prompt) for prompt in prompts]
        self._refuse_unknown(np.array([token for prompt in listed for token in prompt]))
        arguments = {
            "prompts": listed, "new": new, "temperature": how.temperature, "top_p": how.top_p,
            "seeds": list(seeds), "ends": sorted(ends),
        }  # fmt: skip
        said = self._ask("drawn", arguments, task)
        return [[int(token) for token in tokens] for tokens in said]

    def _ask(self, command: str, arguments: Mapping[str, Any], task: Task | None = None) -> Any:
        self.ready()
        self._resume()
        self._send(command, arguments)
        result = self._receive(task)
        self._pause()
        return result

    def _send(self, command: str, arguments: Mapping[str, Any]) -> None:
        line = json.dumps({"command": command, "arguments": arguments}) + "\n"
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(line.encode())
            pipe.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self, task: Task | None) -> Any:
        while True:
            message = json.loads(self._line())
            if "result" in message:
                return message["result"]
            if "error" in message:
                raise _raised(message["error"], self._where)
            if task is not None:
                task.advance(message["advance"])

    def _line(self) -> bytes:
        pipe = self._process.stdout
        assert pipe is not None
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise StageError(
                    self._where,
                    f"did not answer for {self._timeout:g} s\n{self._last_words()}",
                    "run it again with a smaller workload, or on a machine that is less busy",
                )
            received = os.read(pipe.fileno(), 1 << 16)
            if not received:
                raise self._died()
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    @property
    def _where(self) -> str:
        return f"engine {self.engine.exporter} in {self.engine.path}"

    def _died(self) -> StageError:
        code = self._process.wait()
        said = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        fix = "a process that is killed usually lacked memory: see `plan` for what it needs"
        words = self._last_words()
        return StageError(self._where, f"its process ended {said}" + words, fix if code < 0 else "")

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "".join(f"\n    {line}" for line in lines[-_TAIL_LINES:])

    def _pause(self) -> None:
        suspend(self._process)

    def _resume(self) -> None:
        resume(self._process)

    def _end(self) -> None:
        self.release()
        self._files.close()

    def _stop(self) -> None:
        process = self._process
        self._resume()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout=10 if self._vocabulary is not None else 0.1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _file(self, name: str) -> str:
        self._saved += 1  # never the same twice: an array may still be mapped
        return str(self._files.path / f"{self._saved}-{name}")

    def _refuse_unknown(self, ids: np.ndarray) -> None:
        """Refuses tokens that the engine has no embedding of, before they are looked up there."""
        last = int(ids.max()) if ids.size else -1
        if last >= self.ready():
            raise VerifyError(
                self._where,
                f"got token id {last}, but the model knows {self.ready()} ids",
                "a token was added, and the embedding not resized: resize it "
                "(`model.resize_token_embeddings`), or take the token out of the tokenizer",
            )

    def _save(self, ids: np.ndarray) -> str:
        self._refuse_unknown(ids)
        file = self._file("ids.npy")
        np.save(file, np.asarray(ids, dtype=np.int64))
        return file


def environment(machine: Machine) -> dict[str, str]:
    """Makes a worker's environment: this one, with thread pools that sleep, and no network."""
    package = str(Path(prune_export.__file__).parents[1])
    path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": str(machine.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _mapped(file: str) -> np.ndarray:
    mapped: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return mapped


def _raised(error: Mapping[str, Any], where: str) -> PruneExportError:
    kind = getattr(errors, error["kind"], None) if error["kind"] else None
    if kind is None:
        return StageError(where, error["lines"][0].strip(), "this is a defect: please report it")
    raised: PruneExportError = kind(*error["lines"])
    return raised
