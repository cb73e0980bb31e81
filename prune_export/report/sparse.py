"""Words the results on sparse weights and sparse kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from prune_export.report.reading import Report
from prune_export.verify.results import Phase, Placed, Sparsity, Speed, WeightPattern

_FEW: Final = 0.01
"""Weights with a smaller fraction of zeros are dense."""


def weights_text(one: Sparsity) -> str:
    """Words the patterns of weights: `120 of 121 weights hold 2 of 4`, or their share of zeros."""
    sparse = [weight for weight in one.weights if weight.pattern or weight.zeros > _FEW]
    counts = Counter(weight.pattern for weight in sparse if weight.pattern)
    parts = [f"{count} hold {pattern}" for pattern, count in counts.most_common()]
    if loose := [weight for weight in sparse if not weight.pattern]:
        parts.append(f"{len(loose)} no pattern ({_zeros(loose):.0%} zeros)")
    if not parts:
        return "none is sparse"
    return f"of {len(one.weights)} weights {', '.join(parts)}"


def kernels_text(one: Sparsity) -> str:
    """Words what is known of sparse kernels; eligible but not picked is said as such."""
    if not one.asked:
        return one.note
    if one.proven is None:
        return f"sparse kernels allowed, unproven{f': {one.note}' if one.note else ''}"
    eligible = "an unknown number of" if one.eligible is None else str(one.eligible)
    if one.proven:
        chosen = len(one.tactics) if one.chosen is None else one.chosen
        return f"{eligible} layers eligible, {chosen} run sparse kernels"
    if one.eligible:
        return f"{eligible} layers eligible but not picked: dense kernels were faster"
    return "no layer eligible: none runs a sparse kernel"


def stray_text(one: Placed) -> str:
    """Words strays: `3 nodes that multiply were not run by CUDAExecutionProvider (a, b, c)`."""
    count = len(one.strayed)
    names = ", ".join(one.strayed[:3]) + (", …" if count > 3 else "")
    return f"{count} nodes that multiply were not run by {one.asked} ({names})"


def pays_text(speeds: Sequence[Speed]) -> str:
    """Words where it pays: `prefill from 256 to 4,096 tokens, up to 1.31×; decode nowhere`."""
    parts = []
    for (batch, phase), line in lines_of(speeds):
        won = [one for one in line if one.verdict == "faster"]
        lost = [one for one in line if one.verdict == "slower"]
        who = f"{phase}{f' of batch {batch}' if batch != 1 else ''}"
        if won:
            best = max(won, key=lambda one: one.ratio)
            words = f"{who} {_prompts(won, line)}, up to {best.ratio:.2f}×"
        else:
            words = f"{who} nowhere"
        if lost:
            worst = min(lost, key=lambda one: one.ratio)
            words += f" (slower {_prompts(lost, line)}, down to {worst.ratio:.2f}×)"
        parts.append(words)
    return "; ".join(parts)


def lines_of(speeds: Sequence[Speed]) -> Iterator[tuple[tuple[int, Phase], list[Speed]]]:
    """Groups speeds by batch and phase, each by prompt length."""
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for batch in sorted({one.workload.batch for one in speeds}):
        for phase in phases:
            line = [one for one in speeds if (one.workload.batch, one.phase) == (batch, phase)]
            if line:
                yield (batch, phase), sorted(line, key=lambda one: one.workload.prompt)


def is_grid(speeds: Sequence[Speed]) -> bool:
    """Whether speeds have more than one prompt length, so that a line can be drawn."""
    return len({one.workload.prompt for one in speeds}) > 1


def grids(report: Report) -> list[tuple[str, str, list[Speed]]]:
    """Lists the grids to draw: (figure's stem, title, speeds)."""
    checks = report.verification
    if checks is None:
        return []
    found = []
    for engine in dict.fromkeys(one.engine for one in checks.sweep):
        speeds = [one for one in checks.sweep if one.engine == engine]
        if is_grid(speeds):
            found.append(("sweep", f"{engine} against dense", speeds))
    found += [
        ("sparse_gain", f"{one.engine} against itself with sparsity off", one.sweep)
        for one in checks.sparsity
        if is_grid(one.sweep)
    ]
    return found


def _prompts(some: Sequence[Speed], line: Sequence[Speed]) -> str:
    """Words prompt lengths: `at 256 tokens`, `from 256 to 4,096 tokens`, or a list."""
    prompts = [one.workload.prompt for one in some]
    places = [[one.workload.prompt for one in line].index(prompt) for prompt in prompts]
    if len(line) > 1 and len(prompts) == len(line):
        return "everywhere"
    if len(prompts) == 1:
        return f"at {prompts[0]:,} token{'s' if prompts[0] > 1 else ''}"
    if places == list(range(places[0], places[0] + len(places))):
        return f"from {prompts[0]:,} to {prompts[-1]:,} tokens"
    return f"at {', '.join(f'{prompt:,}' for prompt in prompts)} tokens"


def _zeros(weights: Sequence[WeightPattern]) -> float:
    """The fraction of zeros in all weights together."""
    sizes = [weight.inputs * weight.outputs for weight in weights]
    total = sum(weight.zeros * size for weight, size in zip(weights, sizes, strict=True))
    return total / max(sum(sizes), 1)
