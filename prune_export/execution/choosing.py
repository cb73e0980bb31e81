"""Runs a search that ranges over precision, too: structure x engine, the dense model always among.

    1   the dense model on every engine: bytes, speed over the first one, perplexity
    2   where an engine falls short, and no other comes nearer at the same quality: ways to prune
        it to the target on that engine, ranked as in any search
    3   the best of these on every engine

Quality is measured on the engines themselves. What is chosen is the best point by perplexity of
those that reach the target; it may be dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.errors import MissingExtra, PlanError, StageError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import Base
from prune_export.execution.measure import dense_latency_ms, engine_perplexity, engine_speed
from prune_export.execution.optional import OutOfTime, optional
from prune_export.execution.points import DENSE, Point, alternative_of, engine_bytes, to_prune
from prune_export.execution.search import (
    SIZED,
    Data,
    Found,
    Row,
    artifact_of,
    rank,
    rows_of,
    table_of,
)
from prune_export.execution.stages import run_stage
from prune_export.planning import CALIBRATION
from prune_export.recipe import EngineOption, Search, Stage, engines_of
from prune_export.store import Artifact
from prune_export.units import bytes_from_text


@dataclass
class _Choice:
    """A search at work: what it measures with, and the points so far."""

    context: RunContext
    search: Search
    source: Base | Artifact
    data: Data
    arch: Arch
    points: list[Point]

    @property
    def reference(self) -> Point:
        """The dense model on the first engine that could be made: what all is compared with."""
        return self.points[0]

    def measure(self, option: EngineOption, path: Base | Artifact, row: Row | None) -> Point:
        """Builds a model's engine, and measures it beside the reference.

        Raises:
            OutOfTime: something else reaches the target, and there is only time to prove that.
        """
        with self.context.pace.piece("engine"):
            found = self.measured(option, path, row)
        self.context.progress.say(f"search: {found.label}: {found.told}")
        self.points.append(found)
        return found

    def measured(self, option: EngineOption, path: Base | Artifact, row: Row | None) -> Point:
        """Builds a model's engine; its quality, its bytes, and its speed over the reference's."""
        context = self.working
        of = f", {row.candidate.label if row else 'dense'}, {option.label}"
        tokens = self.data.get(CALIBRATION)
        if option.quantize is not None:
            chosen = self.data.get(option.quantize.data)
            path = run_stage(context, option.quantize, path.path, path.id, chosen)
        engine = export_engine(
            context, option.export, path.path, path.id, of=of,
            tokens=tokens[1] if tokens else None,
        )  # fmt: skip
        text = self.data[self.search.validation][1]
        perplexity = engine_perplexity(context, option.label, engine, text)
        speedup = None
        if self.search.target.timed or self.search.measure_speed:
            speedup = 1.0
        if speedup and self.points:
            first, load = self.reference.engine, self.search.target.workload
            speedup = engine_speed(context, first, engine, load)
        return Point(option, engine, perplexity, engine_bytes(engine), speedup, row)

    def share(self, point: Point) -> float:
        """How much of a dense engine's size or time the target leaves it; 1 and more reach it."""
        target, first = self.search.target, self.reference
        if target.bytes is not None:
            return bytes_from_text(target.bytes) / max(point.bytes, 1)
        if target.parameters is not None:
            return target.parameters * first.bytes / max(point.bytes, 1)
        return (point.speedup or 1.0) / self.wanted

    @cached_property
    def wanted(self) -> float:
        """The speedup over the reference that the target asks for."""
        target = self.search.target
        if target.latency_ms is None:
            return target.speedup or 1.0
        step = dense_latency_ms(self.context, self.reference.engine, target.workload)
        return step / target.latency_ms

    def reaches(self, point: Point) -> bool:
        """Whether a point reaches the target, within the search's tolerance."""
        return self.share(point) >= 1 - self.search.target.tolerance

    @property
    def in_hand(self) -> bool:
        """Whether some point reaches the target: what follows is optional then."""
        return any(map(self.reaches, self.points))

    @property
    def working(self) -> RunContext:
        """The context to work with: what is done by it is given up when it is late and optional."""
        pace = self.context.pace
        return optional(self.context, lambda: self.in_hand and not pace.affords({}, healed=False))

    def time_for_engine(self, *, pruned: bool) -> bool:
        """Whether there is time to build and measure one more engine, beside what must follow."""
        return self.context.pace.affords({"engine": 1}, healed=pruned or not self.in_hand)


def run_choice(
    context: RunContext,
    stage: Stage,
    source: Base | Artifact,
    data: Data,
    ignore_keys: tuple[str, ...],
    teacher: Base | None = None,
) -> Found:
    """Runs a search over structure and engine; gives the best point and the table of all.

    Raises:
        StageError: no engine can be made of the model, or nothing reaches the target.
    """
    search: Search = stage.entry
    arch = Checkpoint.open(source.path).arch(ignore_keys)
    choice = _Choice(context, search, source, data, arch, [])
    refused = _dense(choice)
    rows: list[Row] = []
    outside = 0
    for point in to_prune(choice.points, choice.share, choice.reaches, search):
        if choice.in_hand and not _time_to_prune(choice):
            context.say_late(
                "search: an engine reaches the target, and time was too short to prune for "
                f"{point.option.label}."
            )
            continue
        made, others, missed = _pruned(choice, point, teacher)
        rows, outside = rows + made, outside + missed
        refused += others
        if made and made[0].made:
            _on_engines(choice, point.option, made[0], refused)
    chosen = _best(choice, refused)
    chosen.note = "chosen"
    if chosen.row is not None:
        chosen.row.note = "chosen"
    alternative = alternative_of(choice.points, chosen, choice.reaches)
    context.progress.say(f"search: chosen is {chosen.label}. {alternative}")
    table = table_of(search, arch, rows, refused, outside) | {
        "points": [_to_json(choice, point) for point in choice.points],
        "reference": choice.reference.option.label,
        "chosen": chosen.label,
        "alternative": alternative,
    }
    stages = chosen.row.candidate.stages if chosen.row else ()
    made_ids = chosen.row.made if chosen.row else ()
    return Found(
        stages, tuple(artifact_of(context, id_) for id_ in made_ids), table,
        chosen.option, choice.reference.option,
    )  # fmt: skip


def _time_to_prune(choice: _Choice) -> bool:
    """Whether there is time for one candidate: brought to its speed, pruned, on one engine."""
    sized = SIZED if choice.search.target.timed else 0.0
    return choice.context.pace.affords({"size": sized, "prune": 1, "engine": 1})


def _on_engines(
    choice: _Choice, first: EngineOption, row: Row, refused: list[dict[str, Any]]
) -> None:
    """Measures a pruned model on every engine that the dense one ran on, if there is time.

    The first one is what it was pruned for.
    """
    model = row.last or artifact_of(choice.context, row.made[-1])
    others = [one.option for one in choice.points if one.row is None and one.option != first]
    for option in (first, *others):
        if option != first and not choice.time_for_engine(pruned=True):
            _untried(choice, option, row)
            continue
        _try(choice, option, model, row, refused)


def _dense(choice: _Choice) -> list[dict[str, Any]]:
    """Measures the dense model on every engine; lists those that cannot be made of it.

    Raises:
        StageError: none can.
    """
    refused: list[dict[str, Any]] = []
    for option in engines_of(choice.search):
        if choice.in_hand and not choice.time_for_engine(pruned=False):
            _untried(choice, option, None)
            continue
        _try(choice, option, choice.source, None, refused)
    if not choice.points:
        told = "; ".join(f"{one['label']} ({one['note']})" for one in refused)
        raise StageError(
            "search  engines", f"none can be made of this model: {told}", "name other engines"
        )
    return refused


def _untried(choice: _Choice, option: EngineOption, row: Row | None) -> None:
    name = row.candidate.label if row else DENSE
    choice.context.say_late(f"search: {name} was not tried as {option.label}, as time was short.")


def _try(
    choice: _Choice,
    option: EngineOption,
    model: Base | Artifact,
    row: Row | None,
    refused: list[dict[str, Any]],
) -> None:
    """Measures a model on an engine, or notes why there is no such engine."""
    arch = row.candidate.arch if row else choice.arch
    name = row.candidate.label if row else DENSE
    try:
        option.export.entry.check(arch, choice.context.machine)
        choice.measure(option, model, row)
    except OutOfTime:
        _untried(choice, option, row)
    except (PlanError, MissingExtra) as error:
        refused.append({"label": f"{name}, {option.label}", "note": error.problem})
    except StageError as error:
        if not choice.points:
            raise
        refused.append({"label": f"{name}, {option.label}", "note": error.problem})


def _pruned(
    choice: _Choice, point: Point, teacher: Base | None
) -> tuple[list[Row], list[dict[str, Any]], int]:
    """Ranks the ways to prune that bring an engine to the target; none where none does."""
    share = choice.share(point)
    left, wanted = (None, 1 / share) if choice.search.target.timed else (share, None)
    label, context = f"pruned, {point.option.label}", choice.working
    given_up = f"search: pruning for {point.option.label} was given up, as time was short."
    try:
        rows, refused, outside = rows_of(
            context, choice.search, choice.source, choice.arch, left,
            exporter=point.option.export, wanted=wanted, optional=choice.in_hand,
        )  # fmt: skip
    except StageError as error:
        return [], [{"label": label, "note": error.problem}], 0
    except OutOfTime:
        choice.context.say_late(given_up)
        return [], [{"label": label, "note": "time was short"}], 0
    try:
        rank(
            context, choice.search, choice.source, choice.data, rows, teacher,
            optional=choice.in_hand,
        )  # fmt: skip
    except OutOfTime:
        choice.context.say_late(given_up)
        for row in rows:
            row.note = row.note if row.made else "not tried: time was short"
        rows.sort(key=lambda row: row.rank)
    return rows, refused, outside


def _best(choice: _Choice, refused: Sequence[Mapping[str, Any]]) -> Point:
    """The best point by quality of those that reach the target.

    Where that is too close to tell, a dense one, and of these what is fastest, or smallest. Where
    time was short the nearest to the target is better than nothing.

    Raises:
        StageError: none reaches it.
    """
    there = sorted((one for one in choice.points if choice.reaches(one)), key=lambda one: one.loss)
    if there:
        near = [one for one in there if one.loss - there[0].loss <= choice.search.close]
        dense = [one for one in near if one.row is None]
        return max(dense, key=choice.share) if dense else there[0]
    if choice.context.pace.notes:
        nearest = max(choice.points, key=choice.share)
        choice.context.say_late(
            "search: nothing was found in this time that reaches the target; taken is the nearest, "
            f"{nearest.label} ({choice.share(nearest):.0%} of the way)."
        )
        return nearest
    told = [f"{one.label} ({choice.share(one):.0%} of the way)" for one in choice.points]
    told += [f"{one['label']} ({one['note']})" for one in refused]
    raise StageError(
        "search  target",
        f"nothing reaches it: {'; '.join(told)}",
        "ask for less, or allow coarser precisions and other candidates",
    )


def _to_json(choice: _Choice, point: Point) -> dict[str, Any]:
    return {
        "label": point.label,
        "engine": point.option.label,
        "pruned": point.row is not None,
        "perplexity": point.perplexity,
        "speedup": point.speedup,
        "bytes": point.bytes,
        "reaches": choice.reaches(point),
        "note": point.note,
    }
