"""Carries out a search: every candidate is made through the store, so a killed search goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export import registry
from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.recipe import Candidate, Export, Search, Stage, Template, heal_of, templates
from prune_export.run import artifacts
from prune_export.run.artifacts import Base, Bench
from prune_export.run.measure import engine_speed, perplexity_of
from prune_export.store import Artifact, Key
from prune_export.surgery import Drop, Edit, Keep, rewrite

Data = Mapping[str, tuple[Artifact, TokenSet]]

_SHAPES_VERSION: Final = "1"
_TRIALS: Final = 5
"""Engines built, at most, to bring one candidate to a speed."""


@dataclass(frozen=True)
class Found:
    """What a search came to: the winner's stages with their artifacts, and its table."""

    stages: tuple[Stage, ...]
    made: tuple[Artifact, ...]
    table: dict[str, Any]


@dataclass
class _Row:
    """A candidate on its way through the search."""

    candidate: Candidate
    made: list[Artifact]
    speedup: float | None = None
    pruned: float | None = None
    healed: float | None = None
    note: str = ""

    @property
    def rank(self) -> float:
        """The validation perplexity that it is ranked by."""
        return self.healed or self.pruned or float("inf")

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
            "healed": self.healed,
            "note": self.note,
        }


def searched(
    bench: Bench, stage: Stage, source: Base | Artifact, data: Data, ignore_keys: tuple[str, ...]
) -> Found:
    """The best candidate of a search on `source`, and the table of all.

    Raises:
        StageError: no candidate reaches the target.
    """
    search: Search = stage.entry
    arch = Checkpoint.open(source.path).arch(ignore_keys)
    validation = data[search.validation][1]
    rows: list[_Row] = []
    refused: list[dict[str, Any]] = []
    for template in templates(search):
        label = " + ".join(name for name, _, _ in template.items)
        try:
            if search.target.parameters is not None:
                candidate, speedup = _to_size(search, template, arch), None
            else:
                candidate, speedup = _to_speed(bench, search, template, arch, source)
        except PlanError as error:
            refused.append({"label": label, "note": f"{error.where}: {error.problem}"})
            continue
        rows.append(_Row(candidate, [], speedup))
    if not rows:
        raise StageError(
            "search",
            "no candidate reaches the target: "
            + "; ".join(f"{one['label']} ({one['note']})" for one in refused),
            "choose another target, a wider `tolerance`, or other candidates",
        )
    for row in rows:
        _prune(bench, row, source, data)
        last = row.made[-1]
        row.pruned = perplexity_of(bench, row.candidate.label, last, validation)
    healer = heal_of(search)
    if healer is not None:
        _heal(bench, search, healer, rows, data, validation)
    # Those that were not healed are behind those that were.
    rows.sort(key=lambda row: (healer is not None and row.healed is None, row.rank))
    rows[0].note = "chosen"
    table = {
        "target": search.target.model_dump(mode="json"),
        "dense_parameters": arch.parameters(),
        "validation": search.validation,
        "heal": dict(search.heal) if search.heal else None,
        "candidates": [row.to_json(arch.parameters()) for row in rows] + refused,
    }
    bench.progress.say(f"search: {rows[0].candidate.label} is the best of {len(rows)}")
    return Found(rows[0].candidate.stages, tuple(rows[0].made), table)


def _prune(bench: Bench, row: _Row, source: Base | Artifact, data: Data) -> None:
    before: Base | Artifact = source
    for stage in row.candidate.stages:
        row.made.append(
            artifacts.pruned(bench, stage, before.path, before.id, data.get(stage.data))
        )
        before = row.made[-1]


def _heal(
    bench: Bench, search: Search, healer: Stage, rows: list[_Row], data: Data, validation: TokenSet
) -> None:
    from math import log

    best = min(log(row.pruned or float("inf")) for row in rows)
    for row in rows:
        behind = log(row.pruned or float("inf")) - best
        if behind > search.give_up:
            row.note = f"not healed: {behind:.2f} nats behind before healing"
            continue
        last = row.made[-1]
        healed = artifacts.healed(bench, healer, last.path, last.id, data[healer.data])
        row.healed = perplexity_of(bench, f"{row.candidate.label}, healed", healed, validation)


def _to_size(search: Search, template: Template, arch: Arch) -> Candidate:
    wanted = (search.target.parameters or 1.0) * arch.parameters()
    candidate = template.to_size(arch, round(wanted))
    off = candidate.arch.parameters() / wanted - 1
    if abs(off) > search.target.tolerance:
        raise PlanError(candidate.label, f"comes only within {off:+.1%} of the target")
    return candidate


def _to_speed(
    bench: Bench,
    search: Search,
    template: Template,
    arch: Arch,
    source: Base | Artifact,
) -> tuple[Candidate, float]:
    """A candidate whose engine decodes `speedup` times as fast as the dense one.

    Speed depends on shapes alone, so engines of the right shapes are timed before anything is
    scored; the size is found by secants on seconds a step, which are nearly linear in it.
    """
    wanted = search.target.speedup or 1.0
    entry = registry.find("exporters", search.target.engine)()
    export = Export(search.target.engine, entry)
    dense = artifacts.exported(bench, export, source.path, source.id, of=", dense to compare with")
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
        shaped = _shaped(bench, source, arch, candidate.arch)
        engine = artifacts.exported(bench, export, shaped.path, shaped.id, of=", of these shapes")
        speedup = engine_speed(bench, dense, engine, search.target.workload)
        bench.progress.say(
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
            best[0].label, f"comes only within {off:+.1%} of {wanted}x ({best[1]:.2f}x)"
        )
    return best


def _shaped(bench: Bench, source: Base | Artifact, arch: Arch, after: Arch) -> Artifact:
    """`source` cut to the shapes of `after`, whatever is lost: only its speed matters."""
    drop = tuple(range(after.layers, arch.layers))
    sizes = {axis: size for axis, size in after.sizes.items() if arch.sizes[axis] != size}
    key = Key(
        "shapes", "shapes", _SHAPES_VERSION, {"layers": after.layers, "sizes": sizes}, (source.id,)
    )

    def build(files: Path, work: Any) -> Mapping[str, Any]:
        edits: list[Edit] = [Keep(axis, tuple(range(size))) for axis, size in sizes.items()]
        if drop:
            edits.append(Drop(drop))
        rewrite(
            Checkpoint.open(source.path),
            arch,
            edits,
            files,
            ram_bytes=work.machine.ram_bytes,
            progress=work.progress,
        )
        return {}

    return bench.make(key, "search: a model of these shapes", build)
