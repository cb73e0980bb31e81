"""What a method may ask of a calibration pass. Each statistic is a hashable specification."""

from __future__ import annotations

from typing import Protocol


class Statistic(Protocol):
    """A specification of something to gather; equal specifications are gathered once."""

    def __hash__(self) -> int: ...
