"""Checks a plan against this machine: text, places to write to, memory and disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from prune_export.calibrate import inside
from prune_export.errors import PlanError
from prune_export.planning.planned import Plan
from prune_export.recipe import Generated, Recipe, Source, TokenFile
from prune_export.store import refuse_foreign_store
from prune_export.system.files import shown
from prune_export.system.places import judged
from prune_export.units import GIB, text_from_bytes

_CHARACTERS_PER_TOKEN: Final = 4
"""Of English prose, about; only for an estimate of how many windows a file gives."""

_UNKNOWN_WINDOWS: Final = 1000
"""What is assumed of a Hub dataset whose recipe does not limit it."""


def windows_of(source: Source, root: Path) -> int:
    """Counts a source's windows: what it asks for, or an estimate from the size of its files.

    Raises:
        PlanError: one of its files is not there, or lies outside of the data root.
    """
    patterns = (source.tokens,) if isinstance(source, TokenFile) else getattr(source, "files", ())
    size = sum(
        file.stat().st_size
        for pattern in patterns
        for file in inside(root, pattern, f"data files  {shown(pattern)}")
    )
    if source.samples is not None:
        return source.samples
    if isinstance(source, Generated):
        said = (source.generated.answers or 0) * source.generated.new_tokens
        return max(1, said // source.length) if said else _UNKNOWN_WINDOWS
    part = getattr(source, "part", None)
    size = round(size * (part.stop - part.start)) if part else size
    return max(1, size // _CHARACTERS_PER_TOKEN // source.length) if size else _UNKNOWN_WINDOWS


def with_lacking(
    plan: Plan, recipe: Recipe, model: Path, store: Path, out: Path, ram_limit: int | None
) -> Plan:
    """The plan with what is lacking for it: of this machine, or of devices that are not here."""
    if plan.devices.elsewhere:
        return replace(plan, lacking=tuple(what_devices_lack(plan, ram_limit)))
    reads = {"the model": model, "the store": store, "the data root": recipe.root}
    reads |= {"the recipe": recipe.file} if recipe.file else {}
    limit = ram_limit or plan.machine.ram_bytes
    return replace(plan, lacking=tuple(what_does_not_fit(plan, limit, store, out, reads)))


def what_devices_lack(plan: Plan, ram_limit: int | None) -> Iterator[PlanError]:
    """Lists what devices lack for a plan that are not here: their memory, and the host's limit."""
    yield from _too_much_memory(plan, ram_limit) if ram_limit else ()
    for stage in plan.stages:
        if stage.cost.gpu_bytes > plan.machine.gpu_bytes:
            yield PlanError(
                f"{stage.kind} {stage.name}",
                f"needs about {text_from_bytes(stage.cost.gpu_bytes)} on each device, and "
                f"{text_from_bytes(plan.machine.gpu_bytes)} are there",
                "each process holds the whole model in training: use `qlora`, shorter windows, "
                "more removed before, or devices with more"
                if stage.kind == "heal"
                else "use fewer or shorter samples, or devices with more",
            )


def _too_much_memory(plan: Plan, ram_limit: int) -> Iterator[PlanError]:
    heaviest = max(plan.stages, key=lambda stage: stage.cost.ram_bytes)
    if heaviest.cost.ram_bytes > ram_limit:
        yield PlanError(
            f"{heaviest.kind} {heaviest.name}",
            f"needs about {text_from_bytes(heaviest.cost.ram_bytes)} of memory, and "
            f"{text_from_bytes(ram_limit)} may be used",
            "use fewer or shorter samples, a smaller batch, or a machine with more; "
            "`--ram` sets the limit",
        )


def what_does_not_fit(
    plan: Plan, ram_limit: int, store: Path, out: Path, reads: Mapping[str, Path]
) -> Iterator[PlanError]:
    """Lists what this machine lacks for a plan: places to write to, memory, GPU memory, disk.

    `reads` are the places that the work reads or keeps, by name.
    """
    refusals = list(_refusals(store, out, reads))
    yield from refusals
    yield from _too_much_memory(plan, ram_limit)
    if plan.peak_gpu_bytes > plan.machine.gpu_bytes and plan.machine.device == "cuda":
        yield PlanError(
            "GPU",
            f"needs about {text_from_bytes(plan.peak_gpu_bytes)}, and "
            f"{text_from_bytes(plan.machine.gpu_bytes)} of its memory are free",
            "end what else is on it, or pass `--device cpu`",
        )
    for folder in (store, out) if not refusals else ():
        # A result is put together beside its place, or in it if it is there already.
        real = Path(os.path.realpath(folder))
        free = shutil.disk_usage(next(at for at in (real, *real.parents) if at.exists())).free
        if plan.disk_bytes + GIB // 4 > free:
            yield PlanError(
                str(folder),
                f"needs about {text_from_bytes(plan.disk_bytes)} of disk, "
                f"and {text_from_bytes(free)} are free",
                "free some, run `prune-export store gc`, or pass `--store`",
            )


def _refusals(store: Path, out: Path, reads: Mapping[str, Path]) -> Iterator[PlanError]:
    """Lists why the store or the result cannot be written where they shall."""
    try:
        refuse_foreign_store(store)
    except PlanError as error:
        yield error
    try:
        judged(out, reads)
    except PlanError as error:
        yield error
