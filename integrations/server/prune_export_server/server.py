"""Opens an engine and serves it until a signal comes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn

from prune_export import Machine, engines
from prune_export.errors import PlanError, did_you_mean
from prune_export.plugins import load_config, load_ends, load_tokenizer
from prune_export_server.app import Service, application
from prune_export_server.generation import Generator
from prune_export_server.metrics import Metrics
from prune_export_server.text import Words
from prune_export_server.worker import Worker

PREFERRED: Final = ("tensorrt", "ort_genai", "onnx", "aoti", "pytorch")
"""Which engine is taken where none is named: what runs here, the fastest kind first."""
_DEFAULT_LONGEST: Final = 4096


@dataclass(frozen=True)
class Settings:
    """What is served, where, and within which limits; seconds and tokens."""

    directory: Path
    engine: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    most_tokens: int = 4096
    queue: int = 64
    timeout: float = 300.0
    drain: int = 60
    threads: int | None = None
    trust: bool = False


def serve_forever(settings: Settings, ready: Callable[[str], None] | None = None) -> None:
    """Opens the engine, then serves until SIGTERM or SIGINT.

    `ready` is told the address once it listens; it is printed unless given.

    Raises:
        PlanError: the directory does not hold the engine, or it does not run here.
    """
    served: list[_Server] = []
    service = open_service(settings, lambda: bool(served) and served[0].should_exit)
    config = uvicorn.Config(
        application(service), host=settings.host, port=settings.port, log_level="warning",
        access_log=False, timeout_graceful_shutdown=settings.drain, timeout_keep_alive=30,
        http="h11", ws="none", lifespan="off",
    )  # fmt: skip
    served.append(_Server(config, ready or _say(service.model)))
    try:
        served[0].run()
    finally:
        service.worker.close()


def open_service(settings: Settings, draining: Callable[[], bool] = lambda: False) -> Service:
    """Opens the engine in its thread, and gives what the routes need.

    Raises:
        PlanError: the directory does not hold the engine, or it does not run here.
    """
    machine = Machine.detect(threads=settings.threads)
    held = engines(settings.directory, trust=settings.trust)
    running = {key: one for key, one in held.items() if one.runs_on(machine)}
    chosen = settings.engine or next((key for key in PREFERRED if key in running), "pytorch")
    if chosen not in held:
        raise PlanError(
            f"--engine {chosen}",
            f"{settings.directory} does not hold it",
            did_you_mean(chosen, held),
        )
    if chosen not in running:
        raise PlanError(
            f"--engine {chosen}",
            f"cannot be opened: {held[chosen].why_not(machine)}",
            did_you_mean("", running),
        )
    engine = held[chosen]
    config = load_config(settings.directory).get_text_config()
    limits = [engine.longest, getattr(config, "max_position_embeddings", None) or engine.positions]
    longest = min([settings.most_tokens, *(int(one) for one in limits if one)])

    def opened() -> tuple[Generator, Any]:
        # A tokenizer of its own for the engine's thread: one may not be used by two.
        tokenizer = load_tokenizer(settings.directory)
        ends = {*load_ends(settings.directory), tokenizer.eos_token_id} - {None}
        return Generator(engine.open(machine), sorted(ends), longest), tokenizer

    waiting: list[Worker] = []
    metrics = Metrics(
        lambda: float(waiting[0].waiting if waiting else 0),
        lambda: float(waiting[0].busy if waiting else 0),
    )
    worker = Worker(opened, most_waiting=settings.queue, told=metrics.told)
    waiting.append(worker)
    worker.start()
    return Service(
        model=settings.name or settings.directory.resolve().name,
        worker=worker,
        tokenizer=load_tokenizer(settings.directory),
        words=Words(load_tokenizer(settings.directory)),
        vocabulary=int(config.vocab_size),
        longest=longest,
        timeout=settings.timeout,
        metrics=metrics,
        draining=draining,
    )


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: Any = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        if not self.should_exit and self.servers:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def _say(model: str) -> Callable[[str], None]:
    def say(address: str) -> None:
        sys.stdout.write(f"serving {model} at {address}/v1\n")
        sys.stdout.flush()

    return say
