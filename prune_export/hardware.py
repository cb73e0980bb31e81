"""What hardware can make of sparse weights: the rules by which a plan refuses the impossible.

A rule is a function from what is planned to what is wrong with it; `RULES` is all of them. Each
error says what would work instead.

Sources: NVIDIA, "Accelerating Inference with Sparsity Using the NVIDIA Ampere Architecture and
TensorRT" (2 of 4, from compute capability 8.0); TensorRT-RTX's own list of compute capabilities (no
9.0, no 10.0); for CPUs, timings of every installable runtime at 50 % zeros: 0.26 to 0.94 times the
speed of dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.calibrate import inputs_of, linears
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.nm import Nm
from prune_export.recipe import Export, Recipe, Stage
from prune_export.sliding import bound, windows_for

AMPERE: Final = 80
"""The first compute capability whose tensor cores skip zeros, 2 of 4."""

RTX_LACKS: Final = frozenset({90, 100, 103})
"""Data-centre GPUs that TensorRT-RTX has no kernels for: Hopper and Blackwell."""

NATIVE: Final = Nm(2, 4)
_BETTER: Final = Nm(6, 8)


@dataclass(frozen=True)
class Planned:
    """What a recipe would do: the model before and after each stage, and the machine."""

    recipe: Recipe
    archs: tuple[Arch, ...]
    machine: Machine

    @property
    def after(self) -> Arch:
        """What is exported."""
        return self.archs[-1]

    @property
    def sparse_stage(self) -> tuple[int, Stage] | None:
        """The last stage that puts zeros into weights, and its number.

        Zeros that stand for a part of a block, or for widths, are not meant: engines leave them
        out.
        """
        found = [(at, stage) for at, stage in enumerate(self.recipe.stages) if _puts_zeros(stage)]
        return found[-1] if found else None

    @property
    def nm(self) -> Nm | None:
        """The pattern that the last such stage leaves; None where it leaves none."""
        found = self.sparse_stage
        pattern: Nm | None = getattr(found[1].entry, "nm", None) if found else None
        return pattern

    @property
    def cuts_structure(self) -> bool:
        """Whether engines have fewer parameters than the model had."""
        fewer = self.after.parameters() < self.archs[0].parameters()
        return fewer or any(
            stage.kind == "prune" and not _puts_zeros(stage) for stage in self.recipe.stages
        )


Rule = Callable[[Planned], Iterator[PlanError]]


def refuse_impossible(planned: Planned) -> None:
    """Refuses what no hardware, or not this one, can do.

    Raises:
        PlanError: the first rule that is broken, with what to write instead.
    """
    for rule in RULES:
        for error in rule(planned):
            raise error


def windows_note(planned: Planned, export: Export) -> str:
    """What sliding windows rewrite for an export, and gain at most; empty for one without them."""
    if not export.parameters().get("sliding"):
        return ""
    if planned.sparse_stage is None:
        return "windows for what the model itself keeps as 2N-2 of 2N: no stage makes a pattern"
    windows = windows_for(planned.nm) if planned.nm else None
    if planned.nm is None or windows is None or _inside_native(planned.nm):
        return ""
    note = f"{planned.nm} in windows: at most {bound(windows):.2f}x of dense"
    return note if windows == planned.nm else f"{note}, and {windows} would be as fast"


def _pattern_for_tensor_cores(planned: Planned) -> Iterator[PlanError]:
    """Sparse kernels know 2 of 4 only; other patterns need windows, and some have none."""
    if planned.sparse_stage is None or planned.nm == NATIVE:
        return
    for export, keys in _sparse_exports(planned.recipe):
        where = f"export.{export.name}.sparse"
        if planned.nm is None:
            yield PlanError(
                where,
                f"{planned.sparse_stage[1].name} leaves zeros without a pattern, and sparse tensor "
                "cores know 2 of 4 only",
                "write `nm: {keep: 2, of: 4}` instead of `sparsity:`, or leave `sparse` out",
            )
        elif _inside_native(planned.nm) or (keys.get("sliding") and windows_for(planned.nm)):
            continue
        elif windows_for(planned.nm) is None:
            yield PlanError(
                where,
                f"the weights keep {planned.nm}, which neither sparse tensor cores (2 of 4) nor "
                "sliding windows (2N-2 of 2N, up to 14 of 16) can take",
                f"prune with `nm: {{keep: 2, of: 4}}`, or with {_keys(_BETTER)} and write "
                "`sliding: true`",
            )
        else:
            yield PlanError(where, *_needs_windows(planned.nm, own="sliding" in keys))


def _needs_windows(nm: Nm, *, own: bool) -> tuple[str, str]:
    """What is wrong and what to do; `own` says that this exporter has windows."""
    windows = windows_for(nm)
    assert windows is not None
    problem = f"the weights keep {nm}, and sparse tensor cores know 2 of 4 only"
    fix = "" if own else "export with `tensorrt`, and "
    fix += f"write `sliding: true` (exact, at most {bound(windows):.2f}x of dense)"
    if windows != nm:
        fix += f" and prune with {_keys(windows)}, which is as fast and keeps more"
    return problem, f"{fix}; or prune with {_keys(NATIVE)} (at most {bound(NATIVE):.2f}x)"


def _windows_find_zeros(planned: Planned) -> Iterator[PlanError]:
    """Windows rewrite 2N-2 of 2N; a stage that leaves something else gives them nothing to do.

    Without such a stage the model itself may have the zeros, which no plan knows.
    """
    if planned.sparse_stage is None:
        return
    name, nm = planned.sparse_stage[1].name, planned.nm
    instead = f"prune with {_keys(_BETTER)}"
    for export in planned.recipe.export:
        where = f"export.{export.name}.sliding"
        if not export.parameters().get("sliding"):
            continue
        if nm is None:
            yield PlanError(
                where,
                f"{name} leaves zeros without a pattern, and sliding windows rewrite 2N-2 of 2N",
                f"{instead} instead of `sparsity:`, or leave `sliding` out",
            )
        elif _inside_native(nm):
            yield PlanError(
                where,
                f"the weights keep {nm}, which sparse tensor cores take as it is: there is nothing "
                "to rewrite",
                "leave `sliding` out",
            )
        elif windows_for(nm) is None:
            yield PlanError(
                where,
                f"the weights keep {nm}, and sliding windows rewrite 2N-2 of 2N, up to 14 of 16",
                f"{instead}, or leave `sliding` out",
            )


def _zeros_survive(planned: Planned) -> Iterator[PlanError]:
    """Healing fills zeros unless it is told to keep them."""
    if planned.sparse_stage is None or not _needs_zeros(planned.recipe):
        return
    number, sparse = planned.sparse_stage
    for at, stage in enumerate(planned.recipe.stages[number + 1 :], number + 1):
        if stage.kind == "heal" and stage.parameters().get("keep_zeros") is False:
            yield PlanError(
                f"stages.{at}.heal.keep_zeros",
                f"is false, so that healing fills the zeros of {sparse.name}, and no sparse kernel "
                "could run",
                "leave `keep_zeros` out",
            )


def _zeros_come_last(planned: Planned) -> Iterator[PlanError]:
    """A cut of widths takes channels out of groups, and refits what is left."""
    if planned.sparse_stage is None or not _needs_zeros(planned.recipe):
        return
    number, sparse = planned.sparse_stage
    for at, stage in enumerate(planned.recipe.stages[number + 1 :], number + 1):
        before, after = (
            {(tensor.role, arch.shape(tensor)) for tensor in linears(arch)}
            for arch in planned.archs[at : at + 2]
        )
        if not after <= before:
            yield PlanError(
                f"stages.{at}.{stage.kind}: {stage.name}",
                f"cuts widths after {sparse.name}, which breaks the groups of its pattern, and no "
                "sparse kernel could run",
                f"put it before {sparse.name}",
            )


def _inputs_divide(planned: Planned) -> Iterator[PlanError]:
    """Without windows, which pad, a weight's inputs must be whole groups."""
    nm = planned.nm
    if nm is None:
        return
    for export, keys in _sparse_exports(planned.recipe):
        if keys.get("sliding"):
            continue
        for name, inputs in _inputs(planned):
            if inputs % NATIVE.of:
                yield PlanError(
                    f"export.{export.name}.sparse",
                    f"{name} has {inputs} inputs, not a multiple of {NATIVE.of}: its last group "
                    "is not whole, and no sparse kernel takes it",
                    f"cut that width to {inputs - inputs % 32} (a multiple of 32), or leave "
                    "`sparse` out",
                )
                return


def _gpu_skips_zeros(planned: Planned) -> Iterator[PlanError]:
    """Sparse tensor cores came with Ampere."""
    capability = planned.machine.capability
    for export, keys in _sparse_exports(planned.recipe):
        if 0 < capability < AMPERE and keys.get("compute_capability", "current") == "current":
            yield PlanError(
                f"export.{export.name}.sparse",
                f"this GPU has compute capability {capability / 10:g}, and tensor cores skip zeros "
                "from 8.0 (Ampere) on",
                "leave `sparse` out, or choose another GPU",
            )


def _rtx_knows_the_gpu(planned: Planned) -> Iterator[PlanError]:
    """TensorRT-RTX is for GeForce and RTX GPUs."""
    capability = planned.machine.capability
    for export in planned.recipe.export:
        keys = export.parameters()
        rtx = "tensorrt_rtx" in (keys.get("provider"), export.name) or keys.get("flavor") == "rtx"
        here = keys.get("compute_capability", "current") == "current"
        if rtx and here and capability in RTX_LACKS:
            yield PlanError(
                f"export.{export.name}",
                f"this GPU has compute capability {capability / 10:g}, and TensorRT-RTX has no "
                "kernels for data-centre GPUs (Hopper, Blackwell)",
                "use TensorRT itself, or ONNX Runtime with `provider: cuda`",
            )


def _gate_within_reach(planned: Planned) -> Iterator[PlanError]:
    """A gate above what zeros can gain, on this machine or on any."""
    speed = planned.recipe.verify.speed
    if speed is None or speed.at_least is None or speed.at_least <= 1:
        return
    if planned.sparse_stage is None or planned.cuts_structure:
        return
    where = f"verify.speed.at_least: {speed.at_least:g}"
    sparse = {export.name: keys for export, keys in _sparse_exports(planned.recipe)}
    for export in planned.recipe.export:
        keys = sparse.get(export.name)
        if planned.machine.device == "cpu":
            yield PlanError(
                where,
                f"{planned.sparse_stage[1].name} only puts zeros into weights, and no runtime is "
                "faster for them on a CPU: at 50 % the best kernels reach 0.26 to 0.94 times dense",
                "leave `at_least` out, remove blocks or widths as well, or run on a GPU that "
                "knows 2 of 4 with `sparse: true`",
            )
        elif keys is None:
            yield PlanError(
                where,
                f"{planned.sparse_stage[1].name} only puts zeros into weights, and "
                f"{export.name} as written here multiplies with them",
                "write `sparse: true` in an exporter that has it (`tensorrt`), or leave "
                "`at_least` out",
            )
        elif (most := _most(planned.nm, keys)) and speed.at_least > most:
            yield PlanError(
                where,
                f"is more than {planned.nm} can gain: sparse tensor cores allow {most:.2f}x",
                f"write `at_least: {1 + (most - 1) / 2:.2g}` or less, or cut structure as well",
            )


RULES: Final[Sequence[Rule]] = (
    _pattern_for_tensor_cores,
    _windows_find_zeros,
    _zeros_survive,
    _zeros_come_last,
    _inputs_divide,
    _gpu_skips_zeros,
    _rtx_knows_the_gpu,
    _gate_within_reach,
)


def _sparse_exports(recipe: Recipe) -> Iterator[tuple[Export, Mapping[str, Any]]]:
    """The exports that ask for sparse kernels, with their keys."""
    for export in recipe.export:
        keys = export.parameters()
        if keys.get("sparse"):
            yield export, keys


def _needs_zeros(recipe: Recipe) -> bool:
    """Whether an export is of use only if the zeros are where the pattern has them."""
    asked = ("sparse", "sliding")
    return any(export.parameters().get(key) for export in recipe.export for key in asked)


def _inside_native(nm: Nm) -> bool:
    """Whether every weight that holds `nm` holds 2 of 4 as well."""
    return nm.keep == 1 or (nm.keep == NATIVE.keep and nm.of % NATIVE.of == 0)


def _most(nm: Nm | None, keys: Mapping[str, Any]) -> float:
    """The most that sparse kernels gain over dense ones for this pattern; 0 for none."""
    if nm is None:
        return 0.0
    windows = windows_for(nm)
    if not _inside_native(nm):
        return bound(windows) if keys.get("sliding") and windows else 0.0
    return bound(NATIVE)


def _puts_zeros(stage: Stage) -> bool:
    """Whether a stage is by a sparse method, which is one that takes `nm`."""
    return stage.kind == "prune" and hasattr(stage.entry, "nm")


def _inputs(planned: Planned) -> Iterator[tuple[str, int]]:
    """The matrices of the blocks that the sparse stage prunes, with their inputs at the end."""
    assert planned.sparse_stage is not None
    number, stage = planned.sparse_stage
    roles = {tensor.role for tensor in stage.entry.targets(planned.archs[number])}
    for tensor in linears(planned.after):
        if tensor.role in roles:
            yield tensor.name, inputs_of(planned.after, tensor)


def _keys(nm: Nm) -> str:
    return f"`nm: {{keep: {nm.keep}, of: {nm.of}}}`"
