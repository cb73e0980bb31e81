"""What a search over engines has measured: models on engines, and which of them to prune for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log
from pathlib import Path
from typing import Final

from prune_export.execution.search import Row
from prune_export.recipe import EngineOption, Search
from prune_export.store import Artifact
from prune_export.units import text_from_bytes

DENSE: Final = "the dense model"


@dataclass
class Point:
    """A model on an engine, measured; `row` is None for the dense model."""

    option: EngineOption
    engine: Artifact
    perplexity: float
    bytes: int
    speedup: float | None
    row: Row | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """The model, and what it runs on."""
        return f"{self.row.candidate.label if self.row else DENSE}, {self.option.label}"

    @property
    def loss(self) -> float:
        """Its validation loss in nats."""
        return log(self.perplexity) if self.perplexity > 0 else inf

    @property
    def told(self) -> str:
        """What was measured of it, in words."""
        speed = f"{self.speedup:.2f}x as fast, " if self.speedup else ""
        return f"perplexity {self.perplexity:.2f}, {speed}{text_from_bytes(self.bytes)}"


def engine_bytes(engine: Artifact) -> int:
    """The bytes of an engine's files on disk, without tokenizer and settings."""
    return sum(
        (engine.path / name).stat().st_size
        for name in engine.files
        if not (name.endswith((".json", ".txt", ".jinja")) or Path(name).name.startswith("token"))
    )


def to_prune(
    points: Sequence[Point],
    share: Callable[[Point], float],
    reaches: Callable[[Point], bool],
    search: Search,
) -> list[Point]:
    """Lists the dense points that pruning should bring to the target.

    Left out is an engine beside which another needs less pruning at no worse quality, as far as
    `close` tells. Where dense models suffice, the first engine is pruned as the alternative.
    """
    short = [point for point in points if not reaches(point)]
    wanted = [
        point
        for point in short
        if not any(
            other.loss - point.loss <= search.close
            and (share(other), -other.loss) > (share(point), -point.loss)
            for other in points
        )
    ]
    if not wanted and search.alternative and short and short[0] is points[0]:
        return [points[0]]
    return wanted


def alternative_of(points: Sequence[Point], chosen: Point, reaches: Callable[[Point], bool]) -> str:
    """Says in a sentence what the best other choice would have been, pruned if dense was chosen."""
    others = [
        point
        for point in points
        if point is not chosen and reaches(point) and (point.row is None) != (chosen.row is None)
    ]
    if not others:
        what = "pruned" if chosen.row is None else "dense"
        return f"No {what} model that reaches the target was measured."
    best = min(others, key=lambda point: point.loss)
    return f"The alternative was {best.label}: {best.told}; chosen has {chosen.told}."
