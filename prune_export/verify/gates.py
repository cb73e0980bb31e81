"""Checks a recipe's gates (claims of speed and quality) against the measurements."""

from __future__ import annotations

from collections.abc import Sequence

from prune_export.errors import VerifyError
from prune_export.recipe.stages import Workload
from prune_export.verify.results import Gate, Perplexity, Phase, Placed, Speed


def speed_gates(
    speeds: Sequence[Speed], at_least: float | None, phase: Phase = "decode"
) -> list[Gate]:
    """Checks the speed of each engine and workload in `phase`; no gates where nothing is claimed.

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


def placement_gates(placed: Sequence[Placed]) -> list[Gate]:
    """Makes a failed gate for each engine with matrix products on another provider than asked."""
    return [
        Gate(f"nodes of {one.engine} not run by {one.asked}", 0, len(one.strayed), ok=False)
        for one in placed
        if not one.ok
    ]


def perplexity_gates(
    perplexities: Sequence[Perplexity], result: str, at_most: float | None, *, dense: str = "dense"
) -> list[Gate]:
    """Checks that `result`'s perplexity is at most `at_most` times that of `dense`.

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
    """Words a workload: `batch 1, 512 + 128 tokens`."""
    return f"batch {workload.batch}, {workload.prompt} + {workload.new} tokens"
