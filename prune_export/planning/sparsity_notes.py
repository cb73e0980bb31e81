"""What a plan says of zeros: what is done for them in an export, and what they gain at most."""

from __future__ import annotations

from prune_export.kernels.gains import core_rate, gain, instructions_of, packed_as
from prune_export.machine import cpu_features
from prune_export.planning.sparsity_rules import Planned, is_rewritten
from prune_export.recipe import Export
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.slidesparse import bound, windows_for


def windows_note(planned: Planned, export: Export) -> str:
    """Says what SlideSparse rewrites for an export, and gains at most; empty where unused."""
    if not export.parameters().get("sliding"):
        return ""
    if not planned.zeros:
        return "windows for what the model itself keeps as 2N-2 of 2N: no stage makes a pattern"
    return "; ".join(dict.fromkeys(filter(None, (_gain(zeros.nm) for zeros in planned.zeros))))


def packed_note(planned: Planned, export: Export) -> str:
    """Says what an export's packed weights can gain by the zeros of a recipe, on this machine.

    Empty where it packs none; this machine's memory is timed once in a process.
    """
    keys = export.parameters()
    if keys.get("packed") != "sparse":
        return ""
    if not planned.zeros:
        return "packed weights: no stage makes zeros, so only those that the model has count"
    notes = []
    for zeros in planned.zeros:
        rate = core_rate(planned.machine.threads)
        found = gain(*packed_as(keys), zeros.share, rate, instructions_of(cpu_features()))
        notes.append(f"{zeros.share:.0%} zeros of {zeros.name}: {found.note()}")
    return "; ".join(notes)


def _gain(nm: Nm | None) -> str:
    if nm is None or not is_rewritten(nm):
        return ""
    windows = windows_for(nm)
    assert windows is not None
    note = f"{nm} in windows: at most {bound(windows):.2f}x of dense"
    return note if windows == nm else f"{note}, and {windows} would be as fast"
