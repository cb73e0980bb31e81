"""Watches a run: what each step takes beside what was planned, and how much time is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Final

from prune_export.execution.memory import memory_watched
from prune_export.planning import PlannedStage
from prune_export.store import Artifact
from prune_export.system.platforms import peak_ram

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")
_FORGET_PEAK: Final = "5"
_SLOWEST, _QUICKEST = 20.0, 0.3

_LEAST_HEAL: Final = 0.2
"""The part of a planned heal for which time is kept before more candidates are tried."""


@dataclass
class Watch:
    """A run's clock and notebook; `budget` in seconds is None where time does not matter."""

    planned: Sequence[PlannedStage]
    budget: float | None = None
    began: float = field(default_factory=time.monotonic)
    steps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was done otherwise than planned, as time was short, in sentences."""
    pieces: list[tuple[str, float]] = field(default_factory=list)
    """Kind and seconds of each piece of a search that was worked on, not taken from the store."""
    _started: float = 0.0
    _written: int = 0
    _built: int = 0
    _taken: int = 0

    @contextmanager
    def step(
        self, kind: str, name: str | None = None, *, dense: bool = False, label: str = ""
    ) -> Iterator[None]:
        """Notes what the body of a `with` takes, as a step of the plan or under a `label`.

        `dense` is for engines to compare with.
        """
        self._written = self._built = self._taken = 0
        _forget_peak()
        children = _children_peak()
        started = self._started = time.monotonic()
        worked = _processor_seconds()
        with memory_watched() as together:
            yield
        found = [one for one in self.planned if _is(one, kind, name, dense=dense)]
        now = _children_peak()
        self.steps.append(
            {
                "step": label or (f"{kind}: {name}" if name else kind),
                "planned_seconds": sum(one.seconds for one in found) if found else None,
                "seconds": time.monotonic() - started,
                "processor_seconds": _processor_seconds() - worked,
                "planned_ram_bytes": max((one.cost.ram_bytes for one in found), default=None),
                "ram_bytes": max(_own_peak(), now if now > children else 0, together.ram_bytes),
                "planned_disk_bytes": sum(one.cost.disk_bytes for one in found) if found else None,
                "disk_bytes": self._written,
                "reused": self._taken if not self._built else 0,
            }
        )

    @contextmanager
    def piece(self, kind: str, share: float = 1.0) -> Iterator[None]:
        """Notes what the body of a `with` takes, as one of several like pieces of a step.

        `share` is which part of a whole piece it does. What only takes from the store is no measure
        of the next one.
        """
        started, built = time.monotonic(), self._built
        yield
        if self._built > built:
            self.pieces.append((kind, (time.monotonic() - started) / share))

    def note(self, artifact: Artifact, *, built: bool) -> None:
        """Counts an artifact that the current step has built, or found in the store."""
        if not built:
            self._taken += 1
            return
        self._built += 1
        with suppress(OSError):
            self._written += sum((artifact.path / name).stat().st_size for name in artifact.files)

    @property
    def elapsed(self) -> float:
        """Seconds since the current step began."""
        return time.monotonic() - self._started

    @property
    def left(self) -> float:
        """Seconds that are left; infinite without a budget."""
        return inf if self.budget is None else self.budget - (time.monotonic() - self.began)

    @property
    def ratio(self) -> float:
        """How many times as long as planned work took so far, within bounds.

        Of a search that is known piece by piece, the pieces count and not their sum, of which some
        may have been left out. What was taken from the store says nothing.
        """
        parts = self.parts
        known = [(parts[kind], took) for kind, took in self.pieces if parts.get(kind)]
        known += [
            (float(one["planned_seconds"]), float(one["seconds"]))
            for one in self.steps
            if one["planned_seconds"]
            and not one["reused"]
            and not (known and one["step"] == "search")
        ]
        planned = sum(before for before, _ in known)
        if not planned:
            return 1.0
        return min(max(sum(took for _, took in known) / planned, _QUICKEST), _SLOWEST)

    @property
    def parts(self) -> Mapping[str, float]:
        """The planned seconds of one piece of each kind, of the last search."""
        return next((one.parts for one in reversed(self.planned) if one.parts), {})

    def expected(self, kind: str) -> float:
        """Seconds that one more piece of a kind is likely to take: what the last ones took."""
        took = [seconds for own, seconds in self.pieces if own == kind][-3:]
        return sum(took) / len(took) if took else self.ratio * self.parts.get(kind, 0.0)

    def ratio_of(self, kind: str) -> float:
        """How many times as long as planned pieces of a kind took; of all work, where none was."""
        planned = self.parts.get(kind)
        measured = planned and any(own == kind for own, _ in self.pieces)
        return self.expected(kind) / planned if planned and measured else self.ratio

    def affords(self, pieces: Mapping[str, float], *, healed: bool = True) -> bool:
        """Whether there is time for so many pieces of a search, by kind, and for what must follow.

        That are exports, verification and report, at today's pace; and if `healed`, the least that
        a heal is worth.
        """
        if self.budget is None:
            return True
        needed = sum(count * self.expected(kind) for kind, count in pieces.items())
        needed += self.after("search")
        if healed:
            heal = sum(one.seconds for one in self.planned if one.kind == "heal")
            needed += _LEAST_HEAL * self.ratio_of("heal") * heal
        return self.left >= needed

    def after(self, kind: str, ratio: float | None = None) -> float:
        """Seconds that are planned for what follows the last step of a kind, at today's pace."""
        last = max((place for place, one in enumerate(self.planned) if one.kind == kind), default=0)
        rest = sum(one.seconds for one in self.planned[last + 1 :] if one.kind != "heal")
        return (self.ratio if ratio is None else ratio) * rest

    def steps_for(self, steps: int, seconds: float, kind: str, later: float = 0.0) -> int:
        """How many of `steps` training steps, planned to take `seconds`, there is time for.

        Other heals that follow, planned to take `later` seconds, get their part of the time.
        """
        if not seconds:
            return steps
        each = self.ratio_of("heal") * seconds / max(steps, 1)
        spare = (self.left - self.after(kind)) * seconds / (seconds + later)
        return steps if spare >= each * steps else max(1, int(spare / each) if spare > 0 else 1)


def _is(one: PlannedStage, kind: str, name: str | None, *, dense: bool) -> bool:
    if one.kind != kind or (name is not None and one.name != name):
        return False
    return kind != "export" or dense == one.note.endswith("to compare with")


def _forget_peak() -> None:
    """Makes the kernel forget this process's peak, where it can; later peaks are then its own."""
    with suppress(OSError):
        _RESET.write_text(_FORGET_PEAK)


def _own_peak() -> int:
    with suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_ram()


def _processor_seconds() -> float:
    """What this process and those that it has waited for have computed so far."""
    return sum(os.times()[:4])


def _children_peak() -> int:
    return peak_ram(of_children=True)
