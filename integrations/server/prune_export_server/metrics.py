"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "prune_export_requests", "Requests by path and status.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._counters = {
            name: Counter(f"prune_export_{name}", text, registry=self.registry)
            for name, text in (
                ("prompt_tokens", "Tokens of prompts that were fed."),
                ("generated_tokens", "Tokens that were generated."),
                ("generation_seconds", "Seconds spent on generating them."),
                ("cancelled", "Answers that nobody waited for."),
                ("late", "Answers whose time was over."),
                ("failed", "Answers that ended in an error."),
            )
        }
        self._first = Histogram(
            "prune_export_first_token_seconds", "From the request to its first token.",
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        for name, text, read in (
            ("waiting", "Prompts in the queue.", waiting),
            ("running", "Prompts that are answered now.", running),
        ):
            Gauge(f"prune_export_{name}", text, registry=self.registry).set_function(read)

    def told(self, name: str, value: float) -> None:
        """Counts what the engine's thread says."""
        if name == "first_token_seconds":
            self._first.observe(value)
        else:
            self._counters[name].inc(value)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        found: bytes = generate_latest(self.registry)
        return found
