"""Lists the caveats of a result: failures first, then limits of what was shown.

Every sentence follows from a number in the report; page and card show the same list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from prune_export.exporters.ort_genai.tokens import DIFFERENT
from prune_export.report.healing import said_text, terms_of
from prune_export.report.reading import Report, perplexity_change
from prune_export.report.sparse import kernels_text, stray_text, weights_text
from prune_export.report.table import interval, number, speed_text, times, workload_text
from prune_export.verify.results import Generation, Verification

FEW_ROUNDS: Final = 5
FEW_WINDOWS: Final = 8
WIDE_FLOOR: Final = 0.10
"""An A/A interval wider than this hides speedups of that size."""
MUCH_WORSE: Final = 1.5


@dataclass(frozen=True)
class Caveat:
    """`failure`: a check did not pass; `limit`: a bound on what the result shows."""

    kind: Literal["failure", "limit"]
    text: str


def caveats(report: Report | Mapping[str, Any]) -> list[Caveat]:
    """Lists failures, then limits, each in a sentence or two."""
    report = Report.of(report)
    checks = report.verification
    if checks is None:
        found = [Caveat("failure", "Nothing was verified: the run had no verification.")]
    else:
        found = [*_reload(checks), *_gates(checks), *_parity(checks), *_quality(report, checks)]
        found += [
            Caveat("failure", f"The engine of {engine} was not verified: {why}.")
            for engine, why in checks.unverified.items()
        ]
        found += [*_generation(report, checks), *_speed(checks), *_sparsity(checks)]
    found += _scope(report)
    return sorted(found, key=lambda caveat: caveat.kind != "failure")


def failed(report: Report | Mapping[str, Any]) -> bool:
    """Whether a check failed, or none was made."""
    return any(caveat.kind == "failure" for caveat in caveats(report))


def _reload(checks: Verification) -> Iterator[Caveat]:
    reload = checks.reload
    if reload.ok:
        return
    parts = [
        f"{len(names)} {word} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for word, names in (("missing", reload.missing), ("unexpected", reload.unexpected))
        if names
    ]
    why = ": " + ", ".join(parts) if parts else ""
    yield Caveat("failure", f"The checkpoint does not reload in stock transformers{why}.")


def _gates(checks: Verification) -> Iterator[Caveat]:
    for gate in checks.gates:
        if not gate.ok:
            yield Caveat(
                "failure",
                f"The recipe's gate is not met: {gate.what}, claimed {number(gate.claimed)}, "
                f"measured {number(gate.measured)}.",
            )


def _parity(checks: Verification) -> Iterator[Caveat]:
    for one in checks.parity:
        same = f"{one.greedy_equal} of {one.greedy_total} greedy tokens agree"
        error = f"largest logit error {number(one.max_logit_error, 3)}"
        if not one.ok:
            yield Caveat(
                "failure",
                f"{one.engine} does not compute what PyTorch does: {error}, allowed "
                f"{one.tolerance:g}; {same}.",
            )
        elif one.greedy_equal < one.greedy_total:
            yield Caveat("limit", f"{one.engine} differs from PyTorch: {same}, {error}.")


def _quality(report: Report, checks: Verification) -> Iterator[Caveat]:
    if not checks.perplexity:
        yield Caveat("limit", "Perplexity was not measured.")
        return
    for entry in checks.perplexity:
        if not math.isfinite(entry.value):
            yield Caveat("failure", f"The perplexity of {entry.name} is {number(entry.value)}.")
    final = report.perplexity(report.final_name)
    change = perplexity_change(report.perplexity("dense"), final)
    if change is not None and change.ratio >= MUCH_WORSE:
        yield Caveat(
            "limit",
            f"The result's perplexity is {times(change.ratio)} that of the dense model: "
            "expect visibly worse text.",
        )
    for entry in report.engine_perplexities:
        shift = perplexity_change(final, entry)
        if shift is not None and shift.ratio > 1.005:
            yield Caveat(
                "limit",
                f"{entry.name} has a perplexity of {number(entry.value)}, the checkpoint itself "
                f"{number(final.value) if final else ''}: the engine's precision costs that.",
            )
    if report.data.get(report.evaluation, {}).get("prefix") == "first window":
        yield Caveat(
            "limit",
            "Only the first window of the evaluation begins as the tokenizer begins a text (the "
            "papers' protocol): a model that was trained with that in front is judged too badly.",
        )
    windows = min(entry.windows for entry in checks.perplexity)
    if windows < FEW_WINDOWS:
        yield Caveat("limit", f"Perplexity rests on {_count(windows, 'window')} only.")


def _generation(report: Report, checks: Verification) -> Iterator[Caveat]:
    found = {entry.name: entry for entry in checks.generation}
    dense = found.get("dense")
    for entry in checks.generation:
        if entry.name == "dense" or entry is not found.get(report.final_name, entry):
            continue
        bad = [
            f"{count} {word}"
            for word in ("empty", "repetitive", "broken")
            if (count := getattr(entry, word)) > (getattr(dense, word) if dense else 0)
        ]
        if bad:
            yield Caveat(
                "limit",
                f"Of {_count(entry.prompts, 'greedy continuation')}, {entry.name} gave "
                f"{', '.join(bad)}{_dense_had(dense)}.",
            )


def _dense_had(dense: Generation | None) -> str:
    if dense is None:
        return ""
    return f" (dense: {dense.empty} empty, {dense.repetitive} repetitive, {dense.broken} broken)"


def _speed(checks: Verification) -> Iterator[Caveat]:
    if not checks.speed:
        yield Caveat("limit", "Speed was not measured.")
        return
    for one in checks.speed:
        what = f"{one.engine}, {one.phase} ({workload_text(one)})"
        if one.verdict == "no speedup":
            yield Caveat("limit", f"{what}: {speed_text(one)}.")
        elif one.verdict == "slower":
            yield Caveat("limit", f"{what} is slower than dense: {speed_text(one)}.")
        if one.floor_high - one.floor_low > WIDE_FLOOR:
            yield Caveat(
                "limit",
                f"{what}: dense against dense spread over {interval(one.floor_low, one.floor_high)}"
                " on this machine, so smaller speedups could not be seen.",
            )
    rounds = min(min(len(one.dense_seconds), len(one.pruned_seconds)) for one in checks.speed)
    if rounds < FEW_ROUNDS:
        yield Caveat("limit", f"Some speeds rest on {_count(rounds, 'timed round')} only.")
    yield Caveat(
        "limit",
        "Speed holds for the machine, threads and workloads named here; measure again on yours.",
    )


def _sparsity(checks: Verification) -> Iterator[Caveat]:
    for placed in checks.placement:
        if not placed.ok:
            yield Caveat("failure", f"{placed.engine}: {stray_text(placed)}.")
    for one in checks.sparsity:
        if not one.proven:
            yield Caveat("limit", f"{one.engine}: {weights_text(one)}; {kernels_text(one)}.")


def _scope(report: Report) -> Iterator[Caveat]:
    for note in dict.fromkeys(note for one in report.prunes for note in one.log.get("notes") or ()):
        yield Caveat("limit", f"{note[:1].upper()}{note[1:]}.")
    for name, about in report.data.items():
        if terms := terms_of(about):
            yield Caveat(
                "limit", f"`{name}` holds {said_text(about)}; {terms}. Read them before you use it."
            )
    if report.prunes and not report.heals:
        yield Caveat("limit", "The model was not healed (trained) after pruning.")
    for export in report.exports:
        for told in export.notes:
            if told.startswith(DIFFERENT):
                yield Caveat("limit", f"{told}.")
    if not report.exports:
        yield Caveat("limit", "No engine was exported.")
    if not report.base.license:
        yield Caveat("limit", "The base model's licence is not known; it applies to this one too.")


def _count(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"
