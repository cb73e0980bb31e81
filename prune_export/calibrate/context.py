"""What calibration passes are given: the windows, the machine, and where a killed pass goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from prune_export.calibrate.data.token_set import TokenSet
from prune_export.machine import Machine
from prune_export.progress import Progress, Silent


class Engines(Protocol):
    """Measures the speed of engines of narrower models, whose weights do not matter."""

    def speedup(
        self, sizes: Mapping[str, int], engine: str, request: tuple[int, int, int]
    ) -> float:
        """Measures the decode speedup of an engine over the dense one.

        `sizes` are the axes that are cut, such as `{"mlp.0": 512}`, `engine` is an exporter's name,
        `request` is the batch, the prompt's tokens and the new ones.
        """


@dataclass(frozen=True)
class CalibrationContext:
    """What calibration passes need: the windows, the machine, and a scratch folder.

    `scratch` outlives a killed run; a pass that is asked for again goes on from there. `engines`
    measures the speed of model shapes that a method considers.
    """

    tokens: TokenSet
    machine: Machine
    scratch: Path | None = None
    progress: Progress | None = None
    engines: Engines | None = None

    @property
    def told(self) -> Progress:
        """Where progress is told."""
        return self.progress or Silent()

    def of_first(self, samples: int | None = None, length: int | None = None) -> CalibrationContext:
        """The same with the first `samples` windows, cut to their first `length` tokens."""
        if samples is None and length is None:
            return self
        ids = self.tokens.ids[:samples, :length]
        return replace(self, tokens=TokenSet.of(ids, provenance=self.tokens.provenance))
