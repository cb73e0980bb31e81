"""Keeps the builder's log, and parses its lines about sparse kernels.

Wordings, by the library's own strings and public logs:
    8.x        (Sparsity) Layers eligible for sparse math: A, B
               (Sparsity) TRT inference plan picked sparse implementation for layers: B
    10.x-11.x, (Sparsity) Found 2 layer(s) eligible to use sparse tactics: A, B
    RTX        (Sparsity) Chose 1 layer(s) using sparse tactics: B
Names may be missing where the library thinks them too verbose. A builder says it for every pass,
so the last word counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

_TOLD: Final = frozenset({"INTERNAL_ERROR", "ERROR", "WARNING", "INFO"})
_FAULTS: Final = frozenset({"INTERNAL_ERROR", "ERROR"})
_MARK: Final = "(Sparsity)"
_COUNTED: Final = re.compile(r"(\d+) layer\(s\)[^:]*(?::(.*))?$", re.DOTALL)
_ELIGIBLE: Final = ("Layers eligible for sparse math", "eligible to use sparse tactics")
_CHOSEN: Final = ("picked sparse implementation", "using sparse tactics")


@dataclass(frozen=True)
class Layers:
    """The layers in a log line: their number, and the names that it gives."""

    count: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """What a log says of sparse kernels, eligible and chosen; None where it says nothing."""

    eligible: Layers | None = None
    chosen: Layers | None = None


@dataclass
class Log:
    """The lines of a build, `(severity, text)`; verbose ones only where they are about sparsity."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, severity: str, text: str) -> None:
        if severity in _TOLD or _MARK in text:
            self.lines.append((severity, text))

    @property
    def faults(self) -> list[str]:
        """The errors of the build, in order."""
        return [text for severity, text in self.lines if severity in _FAULTS]

    @property
    def text(self) -> str:
        return "".join(f"[{severity}] {text}\n" for severity, text in self.lines)


def logger_for(module: Any, log: Log) -> Any:
    """Makes an `ILogger` of `module` that writes to `log`; it must outlive the builder."""

    class Recorder(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.add(severity.name, msg)

    return Recorder()


def sparsity_said(lines: Iterable[str]) -> Said:
    """Parses the last lines about sparse kernels."""
    eligible: Layers | None = None
    chosen: Layers | None = None
    for line in lines:
        _, mark, said = line.partition(_MARK)
        if not mark:
            continue
        if any(words in said for words in _ELIGIBLE):
            eligible = _layers(said)
        elif any(words in said for words in _CHOSEN):
            chosen = _layers(said)
    return Said(eligible, chosen)


def _layers(said: str) -> Layers:
    counted = _COUNTED.search(said)
    listed = counted.group(2) if counted else said.partition(":")[2]
    names = tuple(name.strip() for name in (listed or "").split(", ") if name.strip(" .…"))
    return Layers(int(counted.group(1)) if counted else len(names), names)
