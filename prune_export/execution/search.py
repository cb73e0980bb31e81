"""Runs a search stage: makes, heals and measures candidates, and picks the best.

Every candidate is made through the store, so a killed search goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, log
from typing import Any, Final

from prune_export import registry
from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.execution import executor
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.executor import Job
from prune_export.execution.inputs import Base
from prune_export.execution.measure import dense_latency_ms, engine_speed
from prune_export.execution.shapes import checkpoint_of_shapes
from prune_export.recipe import (
    Candidate,
    Export,
    Search,
    Stage,
    Template,
    heal_of,
    rungs_of,
    templates,
    unreached,
)
from prune_export.store import Artifact
from prune_export.surgery import Drop, Edit, Keep

Data = Mapping[str, tuple[Artifact, TokenSet]]

_TRIALS: Final = 5
"""Engines built, at most, to bring one candidate to a speed."""


@dataclass(frozen=True)
class Found:
    """The result of a search: the winner's stages with their artifacts, and the table of all."""

    stages: tuple[Stage, ...]
    made: tuple[Artifact, ...]
    table: dict[str, Any]


@dataclass
class _Row:
    """A candidate; `rungs` are its perplexities after each rung of healing."""

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
    rows, refused, outside = _rows(context, search, source, arch, opened.nbytes)
    ids = {name: artifact.id for name, (artifact, _) in data.items()}
    jobs = [
        Job(r.candidate.label, r.candidate.stages, source.path, source.id, ids, search.validation)
        for r in rows
    ]
    healer = heal_of(search)
    with executor.open_executor(search, context) as each:
        for number, result in each(jobs, "pruning"):
            rows[number].made = list(result.made)
            rows[number].pruned = result.perplexity
        if healer is not None:
            _heal(context, each, search, healer, rows, ids, teacher)
    rows.sort(key=lambda row: row.rank)
    if search.measure_speed:
        _time(context, search, source, rows)
    rows[0].note = "chosen"
    table = {
        "target": search.target.model_dump(mode="json"),
        "dense_parameters": arch.parameters(),
        "validation": search.validation,
        "heal": dict(search.heal) if search.heal else None,
        "outside": outside,
        "candidates": [row.to_json(arch.parameters()) for row in rows] + refused,
    }
    context.progress.say(f"search: {rows[0].candidate.label} is the best of {len(rows)}")
    made = tuple(_artifact(context, id_) for id_ in rows[0].made)
    return Found(rows[0].candidate.stages, made, table)


def _rows(
    context: RunContext, search: Search, source: Base | Artifact, arch: Arch, nbytes: int
) -> tuple[list[_Row], list[dict[str, Any]], int]:
    """Makes the candidates that reach the target; lists those refused, and counts those that miss.

    Raises:
        StageError: none does.
    """
    rows: list[_Row] = []
    refused: list[dict[str, Any]] = []
    outside = 0
    known: set[str] = set()
    left = search.target.fraction(nbytes)
    wanted = None if left is not None else _wanted_speedup(context, search, source)
    for template in templates(search):
        try:
            if left is not None:
                candidate, speedup = template.near(arch, left, search.target.tolerance), None
            else:
                assert wanted is not None
                candidate, speedup = _to_speed(context, search, wanted, template, arch, source)
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
            rows.append(_Row(candidate, speedup=speedup))
    if outside:
        context.progress.say(
            f"search: {outside} combinations of the grid are outside of the target, "
            f"{len(rows)} candidates are within {search.target.tolerance:.0%} of it"
        )
    if not rows:
        told = [f"{one['label']} ({one['note']})" for one in refused]
        raise StageError("search", *unreached(told, outside, arch))
    return rows, refused, outside


def _heal(
    context: RunContext,
    each: executor.Each,
    search: Search,
    healer: Stage,
    rows: list[_Row],
    ids: Mapping[str, str],
    teacher: Base | None,
) -> None:
    """Heals by successive halving: candidates that are clearly behind drop out before each rung."""
    best = min(row.loss for row in rows)
    going = [row for row in rows if row.loss - best <= search.give_up]
    for row in rows:
        if row not in going:
            row.note = f"not healed: {row.loss - best:.2f} nats behind before healing"
    rungs = list(rungs_of(healer, search.rungs))
    for number, rung in enumerate(rungs):
        jobs = []
        for row in going:
            before = row.last or _artifact(context, row.made[-1])
            label = f"{row.candidate.label}, healed"
            jobs.append(
                Job(label, (rung,), before.path, before.id, ids, search.validation, teacher)
            )
        title = f"healing, part {number + 1} of {len(rungs)}" if len(rungs) > 1 else "healing"
        for at, result in each(jobs, title):
            going[at].last = _artifact(context, result.made[-1])
            going[at].rungs.append(result.perplexity)
        if number + 1 < len(rungs):
            going = _going_on(search, going)


def _going_on(search: Search, rows: list[_Row]) -> list[_Row]:
    """Keeps the better half, and those that are too close to tell."""
    ranked = sorted(rows, key=lambda row: row.loss)
    best = ranked[0].loss
    kept = ranked[: -(-len(ranked) // 2)]
    kept += [row for row in ranked[len(kept) :] if row.loss - best <= search.close]
    for row in rows:
        if row not in kept:
            row.note = f"given up: {row.loss - best:.2f} nats behind after part of the healing"
    return [row for row in rows if row in kept]


def _artifact(context: RunContext, id_: str) -> Artifact:
    found = context.store.get(id_)
    if found is None:
        raise StageError(
            f"search  {id_}",
            "is not in the store any more",
            "leave the store alone while a search runs; run it again, and it is made anew",
        )
    return found


def _time(context: RunContext, search: Search, source: Base | Artifact, rows: list[_Row]) -> None:
    """Measures the engines of ranked candidates, one at a time, with nothing running beside."""
    export = _export(search)
    dense = export_engine(context, export, source.path, source.id, of=", dense to compare with")
    for row in rows:
        if row.speedup is None and "not healed" not in row.note:
            last = _artifact(context, row.made[-1])
            engine = export_engine(
                context, export, last.path, last.id, of=f", {row.candidate.label}"
            )
            row.speedup = engine_speed(context, dense, engine, search.target.workload)


def _export(search: Search) -> Export:
    return Export(search.target.engine, registry.find("exporters", search.target.engine)())


def _wanted_speedup(context: RunContext, search: Search, source: Base | Artifact) -> float:
    """The speedup that the target asks for; for a latency, the dense engine is timed."""
    if search.target.latency_ms is None:
        return search.target.speedup or 1.0
    dense = export_engine(
        context, _export(search), source.path, source.id, of=", dense to compare with"
    )
    found = dense_latency_ms(context, dense, search.target.workload)
    wanted = found / search.target.latency_ms
    context.progress.say(
        f"search: a step of the dense engine takes {found:.2f} ms, so {wanted:.2f}x is asked for"
    )
    if wanted <= 1:
        raise StageError(
            "search  target.latency_ms",
            f"got {search.target.latency_ms:g} ms, and the dense engine takes {found:.2f} ms",
            "ask for less",
        )
    return wanted


def _to_speed(
    context: RunContext,
    search: Search,
    wanted: float,
    template: Template,
    arch: Arch,
    source: Base | Artifact,
) -> tuple[Candidate, float]:
    """Finds the candidate whose engine decodes `wanted` times as fast as the dense one.

    Speed depends on shapes alone, so engines of the right shapes are timed before anything is
    scored; the size is found by secants on seconds a step, which are nearly linear in it.
    """
    export = _export(search)
    dense = export_engine(context, export, source.path, source.id, of=", dense to compare with")
    total = arch.parameters()
    # (parameters, seconds a step relative to dense): the dense model is known.
    known = [(float(total), 1.0)]
    size = total / wanted
    best: tuple[Candidate, float] | None = None
    tried: set[int] = set()
    for _ in range(_TRIALS):
        candidate = template.to_size(arch, round(size))
        left = candidate.arch.parameters()
        if left in tried:
            break
        tried.add(left)
        shaped = _shaped(context, source, arch, candidate.arch)
        engine = export_engine(context, export, shaped.path, shaped.id, of=", of these shapes")
        speedup = engine_speed(context, dense, engine, search.target.workload)
        context.progress.say(
            f"search: {candidate.label}: {left / total:.1%} of the parameters: {speedup:.2f}x"
        )
        if best is None or abs(speedup / wanted - 1) < abs(best[1] / wanted - 1):
            best = candidate, speedup
        if abs(speedup / wanted - 1) <= search.target.tolerance / 2:
            break
        known.append((float(left), 1 / speedup))
        (x0, y0), (x1, y1) = sorted(known, key=lambda at: abs(at[1] - 1 / wanted))[:2]
        slope = (y1 - y0) / (x1 - x0) if x1 != x0 and y1 != y0 else 1 / total
        size = min(max(x0 + (1 / wanted - y0) / slope, 0.05 * total), 0.999 * total)
    assert best is not None
    off = best[1] / wanted - 1
    if abs(off) > search.target.tolerance:
        raise PlanError(
            best[0].label, f"comes only within {off:+.1%} of {wanted:.3g}x ({best[1]:.2f}x)"
        )
    return best


def _shaped(context: RunContext, source: Base | Artifact, arch: Arch, after: Arch) -> Artifact:
    """Cuts `source` to the shapes of `after` without scoring: only its speed matters."""
    kept = _alike(arch, after)
    drop = tuple(layer for layer in range(arch.layers) if layer not in kept)
    sizes = {}
    for axis, size in after.sizes.items():
        name, *numbers = axis.split(".")
        own = ".".join((name, *(str(kept[int(numbers[0])]), *numbers[1:]))) if numbers else name
        if arch.sizes[own] != size:
            sizes[own] = size
    edits: list[Edit] = [Keep(axis, tuple(range(size))) for axis, size in sizes.items()]
    if drop:
        edits.append(Drop(drop))
    return checkpoint_of_shapes(
        context,
        "shapes",
        {"kept": list(kept), "sizes": sizes},
        source.path,
        source.id,
        arch,
        edits,
        title="search: a model of these shapes",
    )


def _alike(arch: Arch, after: Arch) -> tuple[int, ...]:
    """Chooses blocks of `arch` whose kinds are, in order, those of `after`.

    Mixtures of experts may have blocks without experts, and a cut leaves its own sequence of both.
    """
    found: list[int] = []
    for own in range(arch.layers):
        if len(found) < after.layers and _kinds(arch, own) == _kinds(after, len(found)):
            found.append(own)
    return tuple(found)


def _kinds(arch: Arch, layer: int) -> set[str]:
    return {axis.split(".")[0] for axis in arch.sizes if axis.split(".")[1:2] == [str(layer)]}
