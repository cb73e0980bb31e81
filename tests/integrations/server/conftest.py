"""A tiny engine behind real HTTP on loopback, and an engine that waits to be let go."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import uvicorn
from prune_export_server.app import Service, application
from prune_export_server.server import Settings, _Server, open_service

from prune_export.contracts import Work
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.progress import Silent

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def chatty(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def engine(chatty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an engine of onnx, in a directory of its own."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    machine = Machine(device="cpu", ram_bytes=8 << 30, gpu_bytes=0, threads=1)
    Onnx().export(chatty, folder, Work(machine, Silent(), folder.parent))
    return folder


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The address of a service that listens, in a thread of this process."""
    address: queue.Queue[str] = queue.Queue()
    config = uvicorn.Config(
        application(service), port=0, log_level="warning", http="h11", ws="none", lifespan="off"
    )
    server = _Server(config, address.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield address.get(timeout=60)
    finally:
        server.should_exit = True
        thread.join(60)
        service.worker.close()


@pytest.fixture(scope="session")
def served(engine: Path) -> Iterator[str]:
    with listening(open_service(Settings(engine, threads=1))) as address:
        yield address


@pytest.fixture(scope="session")
def served_pytorch(chatty: Path) -> Iterator[str]:
    with listening(open_service(Settings(chatty, threads=1))) as address:
        yield address


class Gated:
    """A runner of 258 tokens that counts up, and takes each step only when it is let."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(1)  # opening it feeds one step
        self.began: queue.Queue[int] = queue.Queue()

    def __enter__(self) -> Gated:
        return self

    def __exit__(self, *of: object) -> None:
        pass

    def reset(self) -> None:
        pass

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        self.began.put(ids.shape[1])
        assert self.gate.acquire(timeout=60)
        logits = np.zeros((*ids.shape, 258), np.float32)
        np.put_along_axis(logits, ((ids + 1) % 258)[..., None], 9.0, axis=2)
        return logits, 0.0

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self.gate.release()


Opened = Callable[[], tuple[Any, Any]]
