"""All measurements of a run in one call, and the gates that a recipe sets.

Each `measure_*` can be called, and its result kept, by itself; `verify` calls them in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prune_export.calibrate import TokenSet
from prune_export.errors import VerifyError
from prune_export.machine import Machine, describe
from prune_export.progress import Progress, Silent
from prune_export.verify.engine import Engine
from prune_export.verify.generation import measure_generation
from prune_export.verify.parity import measure_parity
from prune_export.verify.quality import measure_perplexity
from prune_export.verify.reload import measure_reload
from prune_export.verify.results import (
    Gate,
    Generation,
    Perplexity,
    Phase,
    Speed,
    Verification,
    Workload,
)
from prune_export.verify.speed import Effort, measure_speed
from prune_export.verify.tasks import measure_tasks


@dataclass(frozen=True)
class EnginePair:
    """An exporter's engine of the result and, to be compared with, that of the dense model."""

    name: str
    pruned: Engine
    dense: Engine | None = None


@dataclass(frozen=True)
class Checks:
    """What to measure, and what must hold.

    `windows` limits perplexity to the first windows of the evaluation tokens. `at_most` is a gate:
    the result's perplexity may be at most this many times the dense model's. `at_least` is a gate
    on the speedup in `phase`, for every engine and workload.
    """

    parity: bool = True
    generation: bool = True
    windows: int | None = None
    engine_perplexity: bool = True
    at_most: float | None = None
    tasks: tuple[str, ...] = ()
    task_samples: int | None = None
    workloads: tuple[Workload, ...] = ()
    effort: Effort = field(default_factory=Effort)
    at_least: float | None = None
    phase: Phase = "decode"


def verify(
    checkpoints: Mapping[str, Path],
    engines: Sequence[EnginePair],
    tokens: TokenSet | None,
    checks: Checks,
    machine: Machine,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Everything that `checks` asks for; the caller turns `not result.ok` into exit code 1.

    `checkpoints` are the model directories by name (`dense`, `pruned`, `healed`), the dense one
    first and the result last. `tokens` are the evaluation windows; without them there is no
    perplexity, parity or speed.

    Raises:
        VerifyError: something that is asked for needs tokens, or a measurement is impossible.
    """
    _check(checkpoints, checks, tokens, engines)
    progress = progress or Silent()
    result = list(checkpoints.values())[-1]
    found = Verification(
        reload=measure_reload(result, machine, progress=progress),
        perplexity=_perplexity(checkpoints, engines, tokens, checks, machine, progress),
        generation=_generation(checkpoints, machine, progress) if checks.generation else [],
        tasks=measure_tasks(
            checks.tasks,
            result,
            machine,
            dense=checkpoints.get("dense"),
            samples=checks.task_samples,
            progress=progress,
        ),
        machine=describe(),
    )
    if tokens is None:
        return found
    ids = tokens.ids.numpy()
    if checks.parity:
        reference = Engine.pytorch(result)
        found.parity.extend(
            measure_parity(pair.pruned, reference, ids, machine, name=pair.name, progress=progress)
            for pair in engines
        )
    for pair in engines if checks.workloads else []:
        if pair.dense is not None:
            found.speed.extend(
                measure_speed(
                    pair.dense,
                    pair.pruned,
                    checks.workloads,
                    ids,
                    machine,
                    name=pair.name,
                    effort=checks.effort,
                    seed=seed,
                    progress=progress,
                )
            )
    found.gates.extend(speed_gates(found.speed, checks.at_least, checks.phase))
    found.gates.extend(perplexity_gates(found.perplexity, list(checkpoints)[-1], checks.at_most))
    return found


def speed_gates(
    speeds: Sequence[Speed], at_least: float | None, phase: Phase = "decode"
) -> list[Gate]:
    """One gate for each engine and workload in `phase`; none where nothing is claimed.

    What must reach `at_least` is the lower end of the 95 % interval, not the ratio: a gate that
    passes would pass again on the same machine in all but a few of a hundred runs. A claim above 1
    moreover needs the verdict `faster`, so nothing inside of the noise floor passes.
    """
    if at_least is None:
        return []
    return [
        Gate(
            what=f"{phase} speedup of {speed.engine} at {described(speed.workload)}",
            claimed=at_least,
            measured=speed.low,
            ok=speed.low >= at_least and (at_least <= 1 or speed.verdict == "faster"),
        )
        for speed in speeds
        if speed.phase == phase
    ]


def perplexity_gates(
    perplexities: Sequence[Perplexity], result: str, at_most: float | None, *, dense: str = "dense"
) -> list[Gate]:
    """The gate that `result`'s perplexity is at most `at_most` times that of `dense`.

    Raises:
        VerifyError: one of the two was not measured.
    """
    if at_most is None:
        return []
    values = {one.name: one.value for one in perplexities}
    absent = [name for name in (dense, result) if name not in values]
    if absent:
        raise VerifyError(
            "verify.quality.at_most",
            f"the perplexity of {' and '.join(absent)} was not measured",
            "name the evaluation data as `verify.quality.perplexity`",
        )
    measured = values[result] / values[dense]
    return [Gate(f"perplexity of {result} / {dense}", at_most, measured, measured <= at_most)]


def described(workload: Workload) -> str:
    """`batch 1, 512 + 128 tokens`."""
    return f"batch {workload.batch}, {workload.prompt} + {workload.new} tokens"


def _perplexity(
    checkpoints: Mapping[str, Path],
    engines: Sequence[EnginePair],
    tokens: TokenSet | None,
    checks: Checks,
    machine: Machine,
    progress: Progress,
) -> list[Perplexity]:
    if tokens is None:
        return []
    measured = {name: Engine.pytorch(path) for name, path in checkpoints.items()}
    if checks.engine_perplexity:
        measured |= {pair.name: pair.pruned for pair in engines}
    return [
        measure_perplexity(name, engine, tokens, machine, windows=checks.windows, progress=progress)
        for name, engine in measured.items()
    ]


def _generation(
    checkpoints: Mapping[str, Path], machine: Machine, progress: Progress
) -> list[Generation]:
    return [
        measure_generation(name, Engine.pytorch(path), path, machine, progress=progress)
        for name, path in checkpoints.items()
    ]


def _check(
    checkpoints: Mapping[str, Path],
    checks: Checks,
    tokens: TokenSet | None,
    engines: Sequence[EnginePair],
) -> None:
    if not checkpoints:
        raise VerifyError("verify", "got no checkpoint", "give the result's directory")
    needs = {
        "verify.parity": checks.parity and engines,
        "verify.quality.at_most": checks.at_most is not None,
        "verify.speed": checks.workloads,
    }
    for what, wanted in needs.items():
        if wanted and tokens is None:
            raise VerifyError(
                what, "needs evaluation tokens", "name a data source in `verify.quality.perplexity`"
            )
