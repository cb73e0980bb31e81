"""Reads a search from report.json: its target, its candidates, and its models on engines."""

from __future__ import annotations

from dataclasses import dataclass, field

from prune_export.report.door import Count, Target


@dataclass(frozen=True)
class CandidateReading:
    """One candidate of a search; numbers are None where it dropped out before."""

    label: str
    note: str = ""
    parameters: int | None = None
    parameters_left: float | None = None
    speedup: float | None = None
    pruned: float | None = None
    healed: float | None = None
    rungs: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float | None:
        """The perplexity that it is ranked by."""
        return self.pruned if self.healed is None else self.healed


@dataclass(frozen=True)
class PointReading:
    """A model on an engine that a search measured, or found that it cannot be made."""

    label: str
    engine: str = ""
    pruned: bool = False
    perplexity: float | None = None
    speedup: float | None = None
    bytes: Count | None = None
    reaches: bool = False
    note: str = ""


@dataclass(frozen=True)
class SearchReading:
    """A search: its target, and its candidates, the best one first.

    `points` are models on engines, where it chose among these, too; `alternative` says in a
    sentence what would have been chosen otherwise.
    """

    target: Target
    candidates: list[CandidateReading]
    validation: str = ""
    outside: int = 0
    points: list[PointReading] = field(default_factory=list)
    reference: str = ""
    chosen: str = ""
    alternative: str = ""

    @property
    def timed(self) -> list[CandidateReading]:
        """The candidates of which both speed and quality were measured."""
        return [
            one for one in self.candidates if one.speedup is not None and one.perplexity is not None
        ]

    @property
    def goal(self) -> str:
        """The target, in words."""
        if self.target.get("speedup") and self.reference:
            return f"{self.target['speedup']:g}x the decoding speed of {self.reference}"
        if self.target.get("speedup"):
            return f"{self.target['speedup']:g}x decoding on {self.target.get('engine')}"
        if self.target.get("latency_ms"):
            return f"{self.target['latency_ms']:g} ms a step on {self.target.get('engine')}"
        if self.target.get("bytes"):
            return f"{self.target['bytes']} of weights"
        of = f"weights of {self.reference}" if self.reference else "parameters"
        return f"{self.target.get('parameters') or 1:.0%} of the {of}"
