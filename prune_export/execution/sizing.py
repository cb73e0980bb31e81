"""Brings candidates of a search to a speed: engines of these shapes are timed before any score."""

from __future__ import annotations

from typing import Final

from prune_export import registry
from prune_export.arch import Arch
from prune_export.errors import PlanError, StageError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.inputs import Base
from prune_export.execution.measure import dense_latency_ms, engine_speed
from prune_export.execution.shapes import checkpoint_of_shapes
from prune_export.recipe import Candidate, Export, Search, Template
from prune_export.store import Artifact
from prune_export.surgery import Drop, Edit, Keep

_TRIALS: Final = 5
"""Engines built, at most, to bring one candidate to a speed."""


def exporter_of(search: Search) -> Export:
    """The exporter whose engines a search times, with its defaults."""
    return Export(search.target.engine, registry.find("exporters", search.target.engine)())


def wanted_speedup(context: RunContext, search: Search, source: Base | Artifact) -> float:
    """The speedup that the target asks for; for a latency, the dense engine is timed."""
    if search.target.latency_ms is None:
        return search.target.speedup or 1.0
    dense = export_engine(
        context, exporter_of(search), source.path, source.id, of=", dense to compare with"
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


def to_speed(
    context: RunContext,
    search: Search,
    wanted: float,
    template: Template,
    arch: Arch,
    source: Base | Artifact,
    export: Export,
    *,
    optional: bool = False,
) -> tuple[Candidate, float]:
    """Finds the candidate whose engine decodes `wanted` times as fast as the dense one.

    Speed depends on shapes alone, so engines of the right shapes are timed before anything is
    scored; the size is found by secants on seconds a step, which are nearly linear in it. An
    `optional` candidate is given up when time is short.

    Raises:
        PlanError: it does not come near that, or not in time.
    """
    dense = export_engine(context, export, source.path, source.id, of=", dense to compare with")
    total = arch.parameters()
    # (parameters, seconds a step relative to dense): the dense model is known.
    known = [(float(total), 1.0)]
    size = total / wanted
    best: tuple[Candidate, float] | None = None
    tried: set[int] = set()
    for trial in range(_TRIALS):
        if trial and optional and not context.pace.affords({"size": 1, "prune": 1, "engine": 1}):
            raise PlanError(template.label, "time was too short to bring it to that speed")
        candidate = template.to_size(arch, round(size))
        left = candidate.arch.parameters()
        if left in tried:
            break
        tried.add(left)
        with context.pace.piece("size"):
            shaped = shaped_model(context, source, arch, candidate.arch)
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


def shaped_model(context: RunContext, source: Base | Artifact, arch: Arch, after: Arch) -> Artifact:
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
