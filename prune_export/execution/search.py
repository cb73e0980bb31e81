"""Runs a search stage: makes, heals and measures candidates, and picks the best.

Every candidate is made through the store, so a killed search goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.execution import executor
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.executor import Job
from prune_export.execution.inputs import Base
from prune_export.execution.measure import engine_speed
from prune_export.execution.sizing import exporter_of, to_speed, wanted_speedup
from prune_export.recipe import (
    Candidate,
    EngineOption,
    Export,
    Search,
    Stage,
    heal_of,
    rungs_of,
    templates,
    unreached,
)
from prune_export.store import Artifact

SIZED: Final = 2.5
"""Engines that are built, on average, to bring a candidate to a speed."""

Data = Mapping[str, tuple[Artifact, TokenSet]]


@dataclass(frozen=True)
class Found:
    """The result of a search: the winner's stages with their artifacts, and the table of all.

    `engine` is there where one was chosen, and `reference` is what its speed is measured against.
    """

    stages: tuple[Stage, ...]
    made: tuple[Artifact, ...]
    table: dict[str, Any]
    engine: EngineOption | None = None
    reference: EngineOption | None = None


@dataclass
class Row:
    """A candidate on its way through healing; `rungs` are its perplexities after each rung."""

    candidate: Candidate
    made: list[str] = field(default_factory=list)
    last: Artifact | None = None
    speedup: float | None = None
    pruned: float | None = None
    rungs: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def rank(self) -> tuple[int, float]:
        """The sort key: candidates that were healed longer are better; the others were dropped."""
        return -len(self.rungs), self.loss

    @property
    def loss(self) -> float:
        """Its current validation loss in nats."""
        found = self.rungs[-1] if self.rungs else self.pruned
        return log(found) if found else inf

    def to_json(self, dense: int) -> dict[str, Any]:
        return {
            "label": self.candidate.label,
            "stages": [
                {"method": stage.name, **stage.parameters()} for stage in self.candidate.stages
            ],
            "parameters": self.candidate.arch.parameters(),
            "parameters_left": self.candidate.arch.parameters() / dense,
            "speedup": self.speedup,
            "pruned": self.pruned,
            "healed": self.rungs[-1] if self.rungs else None,
            "rungs": self.rungs,
            "note": self.note,
        }


def run_search(
    context: RunContext,
    stage: Stage,
    source: Base | Artifact,
    data: Data,
    ignore_keys: tuple[str, ...],
    teacher: Base | None = None,
) -> Found:
    """Runs a search on the checkpoint `source`; gives the best candidate and the table of all.

    `teacher` is there where its healing learns from one.

    Raises:
        StageError: no candidate reaches the target.
    """
    search: Search = stage.entry
    opened = Checkpoint.open(source.path)
    arch = opened.arch(ignore_keys)
    left = search.target.fraction(opened.nbytes)
    wanted = None if left is not None else wanted_speedup(context, search, source)
    exporter = exporter_of(search)
    rows, refused, outside = rows_of(
        context, search, source, arch, left, exporter=exporter, wanted=wanted
    )
    rank(context, search, source, data, rows, teacher)
    if search.measure_speed:
        _time(context, search, source, rows)
    rows[0].note = "chosen"
    table = table_of(search, arch, rows, refused, outside)
    context.progress.say(f"search: {rows[0].candidate.label} is the best of {len(rows)}")
    made = tuple(artifact_of(context, id_) for id_ in rows[0].made)
    return Found(rows[0].candidate.stages, made, table)


def rank(
    context: RunContext,
    search: Search,
    source: Base | Artifact,
    data: Data,
    rows: list[Row],
    teacher: Base | None,
    *,
    optional: bool = False,
) -> None:
    """Prunes, measures and shortly heals candidates, and sorts them, the best one first.

    Where time is limited, candidates for which there is none are left out, the last ones first; at
    least one is made unless all are `optional`. Then `made` of some rows is empty.
    """
    ids = {name: artifact.id for name, (artifact, _) in data.items()}
    jobs = [
        Job(r.candidate.label, r.candidate.stages, source.path, source.id, ids, search.validation)
        for r in rows
    ]
    healer, pace = heal_of(search), context.pace
    engine = 1.0 if search.engines else 0.0
    with executor.open_executor(search, context) as each:
        done = 0
        found = each(jobs, "pruning")
        while done < len(jobs):
            if (done or optional) and not pace.affords({"prune": 1, "engine": engine}):
                left = len(jobs) - done
                context.say_late(
                    f"search: {left} of {len(jobs)} candidates were not pruned, as time was short."
                )
                break
            with pace.piece("prune"):
                number, result = next(found)
            rows[number].made = list(result.made)
            rows[number].pruned = result.perplexity
            done += 1
        found.close()
        for row in rows:
            row.note = row.note if row.made else "not tried: time was short"
        if healer is not None and done:
            _heal(context, each, search, healer, rows, ids, teacher)
    rows.sort(key=lambda row: row.rank)


def table_of(
    search: Search, arch: Arch, rows: list[Row], refused: list[dict[str, Any]], outside: int
) -> dict[str, Any]:
    """The table of a search for the report: target, and every candidate, ranked ones first."""
    return {
        "target": search.target.model_dump(mode="json"),
        "dense_parameters": arch.parameters(),
        "validation": search.validation,
        "heal": dict(search.heal) if search.heal else None,
        "outside": outside,
        "candidates": [row.to_json(arch.parameters()) for row in rows] + refused,
    }


def rows_of(
    context: RunContext,
    search: Search,
    source: Base | Artifact,
    arch: Arch,
    left: float | None,
    *,
    exporter: Export,
    wanted: float | None = None,
    optional: bool = False,
) -> tuple[list[Row], list[dict[str, Any]], int]:
    """Makes the candidates that reach the target; lists those refused, and counts those that miss.

    `left` is the fraction of the parameters to keep; None where engines of `exporter` are brought
    to `wanted` times the dense one's speed. For those is stopped when time is short and there is
    one, or all are `optional`.

    Raises:
        StageError: none does.
    """
    rows: list[Row] = []
    refused: list[dict[str, Any]] = []
    outside = 0
    known: set[str] = set()
    for template in templates(search):
        if left is None and (rows or optional) and not _time_for(context, search, len(rows)):
            context.say_late(
                f"search: {template.label} and what follows were not timed, as time was short."
            )
            break
        try:
            if left is not None:
                candidate, speedup = template.near(arch, left, search.target.tolerance), None
            else:
                assert wanted is not None
                candidate, speedup = to_speed(
                    context, search, wanted, template, arch, source, exporter, optional=optional
                )
        except PlanError as error:
            if template.of_grid:
                outside += 1
            else:
                refused.append({"label": template.label, "note": template.why_not(error)})
            continue
        # Different amounts of a grid may round to the same sizes; what is written may differ in any
        # key, and labels do not have them all.
        same = repr(candidate.stages)
        shape = repr((dict(candidate.arch.sizes), [stage.name for stage in candidate.stages]))
        if (shape if template.of_grid else same) not in known:
            known.add(shape if template.of_grid else same)
            rows.append(Row(candidate, speedup=speedup))
    if outside:
        context.progress.say(
            f"search: {outside} combinations of the grid are outside of the target, "
            f"{len(rows)} candidates are within {search.target.tolerance:.0%} of it"
        )
    if not rows:
        told = [f"{one['label']} ({one['note']})" for one in refused]
        raise StageError("search", *unreached(told, outside, arch))
    return rows, refused, outside


def _time_for(context: RunContext, search: Search, before: int) -> bool:
    """Whether there is time to bring one more candidate to a speed, and to prune all so far."""
    engine = 1.0 if search.engines else 0.0
    return context.pace.affords({"size": SIZED, "prune": before + 1, "engine": engine})


def _heal(
    context: RunContext,
    each: executor.Each,
    search: Search,
    healer: Stage,
    rows: list[Row],
    ids: Mapping[str, str],
    teacher: Base | None,
) -> None:
    """Heals by successive halving: candidates that are clearly behind drop out before each rung."""
    best = min(row.loss for row in rows)
    going = [row for row in rows if row.loss - best <= search.give_up]
    for row in rows:
        if row.made and row not in going:
            row.note = f"not healed: {row.loss - best:.2f} nats behind before healing"
    rungs = list(rungs_of(healer, search.rungs))
    for number, rung in enumerate(rungs):
        share = _part_of(healer, rung)
        more = {"heal": share * len(going), "engine": 1.0 if search.engines else 0.0}
        if not context.pace.affords(more):
            context.say_late(
                f"search: candidates were ranked after {number} of {len(rungs)} parts of their "
                "healing, as time was short."
            )
            return
        jobs = []
        for row in going:
            before = row.last or artifact_of(context, row.made[-1])
            label = f"{row.candidate.label}, healed"
            jobs.append(
                Job(label, (rung,), before.path, before.id, ids, search.validation, teacher)
            )
        title = f"healing, part {number + 1} of {len(rungs)}" if len(rungs) > 1 else "healing"
        found = each(jobs, title)
        for _ in jobs:
            with context.pace.piece("heal", share):
                at, result = next(found)
            going[at].last = artifact_of(context, result.made[-1])
            going[at].rungs.append(result.perplexity)
        found.close()
        if number + 1 < len(rungs):
            going = _going_on(search, going)


def _part_of(healer: Stage, rung: Stage) -> float:
    """The part of a heal's steps that a rung of it takes."""
    own, whole = (getattr(one.entry, "steps", None) for one in (rung, healer))
    return own / whole if isinstance(own, int) and isinstance(whole, int) and whole else 1.0


def _going_on(search: Search, rows: list[Row]) -> list[Row]:
    """Keeps the better half, and those that are too close to tell."""
    ranked = sorted(rows, key=lambda row: row.loss)
    best = ranked[0].loss
    kept = ranked[: -(-len(ranked) // 2)]
    kept += [row for row in ranked[len(kept) :] if row.loss - best <= search.close]
    for row in rows:
        if row not in kept:
            row.note = f"given up: {row.loss - best:.2f} nats behind after part of the healing"
    return [row for row in rows if row in kept]


def artifact_of(context: RunContext, id_: str) -> Artifact:
    """The artifact of an id that this search has made.

    Raises:
        StageError: somebody removed it.
    """
    found = context.store.get(id_)
    if found is None:
        raise StageError(
            f"search  {id_}",
            "is not in the store any more",
            "leave the store alone while a search runs; run it again, and it is made anew",
        )
    return found


def _time(context: RunContext, search: Search, source: Base | Artifact, rows: list[Row]) -> None:
    """Measures the engines of ranked candidates, one at a time, with nothing running beside."""
    export = exporter_of(search)
    dense = export_engine(context, export, source.path, source.id, of=", dense to compare with")
    for row in rows:
        if row.made and row.speedup is None and "not healed" not in row.note:
            last = artifact_of(context, row.made[-1])
            engine = export_engine(
                context, export, last.path, last.id, of=f", {row.candidate.label}"
            )
            row.speedup = engine_speed(context, dense, engine, search.target.workload)
