"""Describes an engine so that another process can open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from prune_export import registry
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Bounded, BuildRecord, Runner
from prune_export.errors import CheckpointError, UnsupportedArch, VerifyError
from prune_export.exporter_facts import ExporterFacts, calibrates, runs_code
from prune_export.machine import Machine
from prune_export.system.files import open_regular

PYTORCH: Final = "pytorch"
"""The name under which a checkpoint itself is an engine: transformers in eager mode."""


@dataclass(frozen=True)
class Engine:
    """An engine that can be opened as a `Runner`: its exporter, the exporter's keys, and its path.

    `weight_bytes` is what one decode step must read of weights, 0 where that is not known.
    `trusted` says that it was made here or that its user vouches for it: an engine that holds
    machine code is not opened otherwise.
    """

    exporter: str
    path: Path
    parameters: Mapping[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    trusted: bool = False

    @staticmethod
    def of(record: BuildRecord, path: Path, *, trusted: bool = False) -> Engine:
        """Makes the description of the engine in `path` from its build record."""
        return Engine(record.exporter, path, dict(record.parameters), record.weight_bytes, trusted)

    @staticmethod
    def pytorch(checkpoint: Path, *, weight_bytes: int = 0, **parameters: Any) -> Engine:
        """Describes a checkpoint in PyTorch eager; `parameters` are fields of `PyTorch`."""
        return Engine(PYTORCH, checkpoint, parameters, weight_bytes)

    @property
    def positions(self) -> int | None:
        """The number of learned positions; None where they are computed, or unknown."""
        try:
            opened = Checkpoint.open(self.path, weights=False)
            return opened.arch(ignore_keys=opened.full_config()).positions
        except UnsupportedArch:
            return None

    @property
    def longest(self) -> int | None:
        """The longest sequence that the engine takes, prompt and answer; None: any."""
        if not isinstance(self._entry, Bounded):
            return None
        return self._entry.longest(Checkpoint.open(self.path, weights=False).full_config())

    @property
    def runs_code(self) -> bool:
        """Whether opening it runs machine code from its files.

        Raises:
            VerifyError: as `open`.
        """
        return runs_code(self._entry)

    def runs_on(self, machine: Machine) -> bool:
        """Whether this machine has the device that it needs."""
        return not self.why_not(machine)

    def why_not(self, machine: Machine) -> str:
        """Why it cannot be opened on this machine, to go on a sentence; empty where it can."""
        facts = ExporterFacts.of(self._kind)
        if facts.unopened:
            return facts.unopened
        if facts.runs_on is None or machine.device in facts.runs_on:
            return ""
        return f"it does not run on {machine.device}, which is all there is"

    @property
    def calibrated(self) -> bool:
        """Whether its activations are quantized too, by scales measured on calibration data.

        Raises:
            VerifyError: as `open`.
        """
        return calibrates(self._entry)

    @property
    def _kind(self) -> Any:
        if self.exporter != PYTORCH:
            return registry.find("exporters", self.exporter)
        from prune_export.verify.pytorch import PyTorch  # torch with it

        return PyTorch

    @property
    def _entry(self) -> Any:
        try:
            return TypeAdapter(self._kind).validate_python(dict(self.parameters))
        except ValidationError as error:
            first = error.errors()[0]
            raise VerifyError(
                f"engine {self.exporter}  {'.'.join(map(str, first['loc']))}",
                f"got {first['input']!r}: {first['msg']}",
                "export it again with this version of prune_export",
            ) from error

    def open(self, machine: Machine) -> Runner:
        """Opens it in this process.

        Raises:
            CheckpointError: it holds machine code, and nobody vouches for it.
            VerifyError: the exporter does not know a parameter of the build record.
            PlanError: no such exporter.
        """
        if self.runs_code and not self.trusted:
            raise CheckpointError(
                str(self.path),
                f"an engine of `{self.exporter}` holds machine code, and this one was not made "
                "with the store at hand",
                "pass `--trust-engine` if you trust whoever made it, or export it again",
            )
        _refuse_special(self.path)
        runner: Runner = self._entry.open(self.path, machine)
        return runner

    def to_json(self) -> dict[str, Any]:
        return {
            "exporter": self.exporter,
            "path": str(self.path),
            "parameters": dict(self.parameters),
            "weight_bytes": self.weight_bytes,
            "trusted": self.trusted,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Engine:
        return Engine(
            data["exporter"],
            Path(data["path"]),
            data["parameters"],
            data["weight_bytes"],
            data["trusted"],
        )


def _refuse_special(directory: Path) -> None:
    """Refuses a directory that holds a pipe, a device or a socket.

    Engines are opened by libraries that read whatever stands under a name, for ever if need be.

    Raises:
        CheckpointError: naming it.
    """
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        if not file.is_dir():
            open_regular(file, None, "a file of an engine").close()
