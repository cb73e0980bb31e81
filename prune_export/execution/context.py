"""The context of a run: its store, machine, progress, team, handed on as one value."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_export.contracts import Work
from prune_export.errors import PruneExportError, StageError
from prune_export.execution.watch import Watch
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.store import Artifact, Key, Store
from prune_export.system.processes import ALONE, Team


@dataclass(frozen=True)
class RunContext:
    """The context with which every artifact of a run is made."""

    store: Store
    machine: Machine
    progress: Progress
    force: frozenset[str] = frozenset()
    ignore_keys: tuple[str, ...] = ()
    command: str = ""
    team: Team = ALONE
    watch: Watch | None = None

    @property
    def pace(self) -> Watch:
        """The clock of the run; one without a plan and a limit where there is none."""
        return self.watch or Watch(())

    def say_late(self, text: str) -> None:
        """Says, also in the report, what was left out or cut as time was short."""
        self.progress.say(text)
        if self.watch is not None:
            self.watch.notes.append(text[0].upper() + text[1:])

    def make(
        self, key: Key, label: str, build: Callable[[Path, Work], Mapping[str, Any]]
    ) -> Artifact:
        """Makes the artifact of `key`, or takes it from the store; explains unexpected errors.

        Raises:
            StageError: `build` failed in a way that nobody foresaw; the log is kept.
        """

        def guarded(files: Path, scratch: Path) -> Mapping[str, Any]:
            try:
                return build(files, Work(self.machine, self.progress, scratch, team=self.team))
            except PruneExportError:
                raise
            except MemoryError:
                raise StageError(
                    label,
                    "ran out of memory",
                    "use fewer or shorter samples, or `--ram` to plan with less",
                ) from None
            except Exception as error:
                log = scratch.parent / "error.log"
                log.write_text(traceback.format_exc(), encoding="utf-8")
                raise StageError(
                    label,
                    f"failed: {type(error).__name__}: {error}",
                    f"the log is {log}; what was finished is kept, go on with\n  {self.command}",
                ) from error
            finally:
                if self.machine.device == "cuda":
                    _hand_back()

        forced = not self.force.isdisjoint({key.kind, key.name, f"{key.kind}.{key.name}"})
        before = None if forced else self.store.get(key.id)
        if before is not None:
            self.progress.say(f"{label}: already there")
            self._noted(before, built=False)
            return before
        self.progress.say(label)
        made = self.store.make(
            key,
            guarded,
            force=forced,
            waiting=lambda: self.progress.say(f"{label}: another process is at it; waiting"),
        )
        self._noted(made, built=True)
        return made

    def _noted(self, artifact: Artifact, *, built: bool) -> None:
        if self.watch is not None:
            self.watch.note(artifact, built=built)


def _hand_back() -> None:
    """Frees GPU memory that torch caches: engines are verified in processes of their own."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
