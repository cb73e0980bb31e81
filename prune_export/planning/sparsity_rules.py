"""Rules by which the plan refuses sparsity that no kernel of the hardware can use.

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
from functools import cached_property
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.calibrate import inputs_of, linears
from prune_export.errors import PlanError
from prune_export.kernels.gains import beyond_reach
from prune_export.machine import Machine
from prune_export.recipe import Export, Recipe, Stage
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.slidesparse import bound, windows_for

AMPERE: Final = 80
"""The first compute capability whose tensor cores skip zeros, 2 of 4."""

RTX_LACKS: Final = frozenset({90, 100, 103})
"""Data-centre GPUs that TensorRT-RTX has no kernels for: Hopper and Blackwell."""

NATIVE: Final = Nm(2, 4)
_BETTER: Final = Nm(6, 8)


@dataclass(frozen=True)
class Zeros:
    """A stage whose zeros reach the engines: its number, and its words for errors."""

    at: int
    stage: Stage
    name: str
    weights: str

    @property
    def nm(self) -> Nm | None:
        """The N:M pattern that it leaves; None where it leaves none."""
        pattern: Nm | None = self.stage.entry.nm
        return pattern

    @property
    def share(self) -> float:
        """The fraction of its weights that it makes zero."""
        if self.nm is not None:
            return 1 - self.nm.keep / self.nm.of
        return float(getattr(self.stage.entry, "sparsity", None) or 0.0)


@dataclass(frozen=True)
class Planned:
    """A recipe's course: the model before and after each stage, and the machine."""

    recipe: Recipe
    archs: tuple[Arch, ...]
    machine: Machine

    @property
    def after(self) -> Arch:
        """The shapes of the model that is exported."""
        return self.archs[-1]

    @cached_property
    def zeros(self) -> tuple[Zeros, ...]:
        """The stages whose zeros remain: without those whose weights later ones prune again.

        Zeros that stand for a part of a block, or for widths, are not meant: engines leave them
        out.
        """
        sparse = [at for at, stage in enumerate(self.recipe.stages) if _puts_zeros(stage)]
        found = [at for at in sparse if not self._pruned_again(at, sparse)]
        stages = self.recipe.stages
        if len(found) == 1:
            return (Zeros(found[0], stages[found[0]], stages[found[0]].name, "the weights"),)
        names = {at: f"{stages[at].name} (stages.{at})" for at in found}
        return tuple(
            Zeros(at, stages[at], names[at], f"the weights that {names[at]} prunes") for at in found
        )

    def _pruned_again(self, at: int, sparse: Sequence[int]) -> bool:
        """Whether later stages prune all that this one does.

        Blocks removed in between have no known numbers: then only roles of all blocks count.
        """
        left = self._targets(at)
        for later in sparse:
            if later <= at:
                continue
            if self.archs[later].layers == self.archs[at].layers:
                left -= self._targets(later)
            elif self.recipe.stages[later].entry.layers is None:
                roles = {role for role, _ in self._targets(later)}
                left = {one for one in left if one[0] not in roles}
        return not left

    def _targets(self, at: int) -> set[tuple[str, int | None]]:
        """Role and block of the matrices that a sparse stage prunes."""
        found = self.recipe.stages[at].entry.targets(self.archs[at])
        return {(tensor.role, tensor.layer) for tensor in found}

    @property
    def cuts_structure(self) -> bool:
        """Whether the engines have fewer parameters than the model."""
        fewer = self.after.parameters() < self.archs[0].parameters()
        return fewer or any(
            stage.kind == "prune" and not _puts_zeros(stage) for stage in self.recipe.stages
        )


Rule = Callable[[Planned], Iterator[PlanError]]


def refuse_impossible(planned: Planned) -> None:
    """Refuses what no hardware, or not this machine's, can do.

    Raises:
        PlanError: the first rule that is broken, with what to write instead.
    """
    for rule in RULES:
        for error in rule(planned):
            raise error


def _pattern_for_tensor_cores(planned: Planned) -> Iterator[PlanError]:
    """Sparse tensor cores know 2:4 only; other patterns need SlideSparse, and some have none."""
    for export, keys in _sparse_exports(planned.recipe):
        where = f"export.{export.name}.sparse"
        for zeros in planned.zeros:
            nm = zeros.nm
            if nm is None:
                yield PlanError(
                    where,
                    f"{zeros.name} leaves zeros without a pattern, and sparse tensor cores know "
                    "2 of 4 only",
                    "write `nm: {keep: 2, of: 4}` instead of `sparsity:`, or leave `sparse` out",
                )
            elif _inside_native(nm) or (keys.get("sliding") and windows_for(nm)):
                continue
            elif windows_for(nm) is None:
                yield PlanError(
                    where,
                    f"{zeros.weights} keep {nm}, which neither sparse tensor cores (2 of 4) nor "
                    "sliding windows (2N-2 of 2N, up to 14 of 16) can take",
                    f"prune with `nm: {{keep: 2, of: 4}}`, or with {_keys(_BETTER)} and write "
                    "`sliding: true`",
                )
            else:
                yield PlanError(where, *_needs_windows(zeros, nm, own="sliding" in keys))


def _needs_windows(zeros: Zeros, nm: Nm, *, own: bool) -> tuple[str, str]:
    """Words the refusal of a pattern that needs SlideSparse; `own`: this exporter has it."""
    windows = windows_for(nm)
    assert windows is not None
    problem = f"{zeros.weights} keep {nm}, and sparse tensor cores know 2 of 4 only"
    fix = "" if own else "export with `tensorrt`, and "
    fix += f"write `sliding: true` (exact, at most {bound(windows):.2f}x of dense)"
    if windows != nm:
        fix += f" and prune with {_keys(windows)}, which is as fast and keeps more"
    return problem, f"{fix}; or prune with {_keys(NATIVE)} (at most {bound(NATIVE):.2f}x)"


def _windows_find_zeros(planned: Planned) -> Iterator[PlanError]:
    """SlideSparse rewrites (2N-2):2N; stages that all leave other patterns give it nothing to do.

    Without such a stage the model itself may have the zeros, which no plan knows.
    """
    if any(zeros.nm and is_rewritten(zeros.nm) for zeros in planned.zeros):
        return
    for export in planned.recipe.export:
        if export.parameters().get("sliding"):
            where = f"export.{export.name}.sliding"
            yield from (PlanError(where, *_not_rewritten(zeros)) for zeros in planned.zeros)


def _not_rewritten(zeros: Zeros) -> tuple[str, str]:
    """Says why SlideSparse does not rewrite what a stage leaves, and what to do."""
    nm, better = zeros.nm, f"prune with {_keys(_BETTER)}"
    if nm is None:
        return (
            f"{zeros.name} leaves zeros without a pattern, and sliding windows rewrite 2N-2 of 2N",
            f"{better} instead of `sparsity:`, or leave `sliding` out",
        )
    if _inside_native(nm):
        return (
            f"{zeros.weights} keep {nm}, which sparse tensor cores take as it is: there is nothing "
            "to rewrite",
            "leave `sliding` out",
        )
    return (
        f"{zeros.weights} keep {nm}, and sliding windows rewrite 2N-2 of 2N, up to 14 of 16",
        f"{better}, or leave `sliding` out",
    )


def _zeros_survive(planned: Planned) -> Iterator[PlanError]:
    """Healing fills zeros unless it is told to keep them."""
    packs = any(one.parameters().get("packed") == "sparse" for one in planned.recipe.export)
    for zeros, at, stage in _after_zeros(planned) if packs or _needs_zeros(planned.recipe) else ():
        if stage.kind == "heal" and stage.parameters().get("keep_zeros") is False:
            yield PlanError(
                f"stages.{at}.heal.keep_zeros",
                f"is false, so that healing fills the zeros of {zeros.name}, and no sparse kernel "
                "could run",
                "leave `keep_zeros` out",
            )


def _zeros_come_last(planned: Planned) -> Iterator[PlanError]:
    """Width pruning after N:M sparsity breaks the pattern: it removes channels and refits."""
    for zeros, at, stage in _after_zeros(planned) if _needs_zeros(planned.recipe) else ():
        before, after = (
            {(tensor.role, arch.shape(tensor)) for tensor in linears(arch)}
            for arch in planned.archs[at : at + 2]
        )
        if not after <= before:
            yield PlanError(
                f"stages.{at}.{stage.kind}: {stage.name}",
                f"cuts widths after {zeros.name}, which breaks the groups of its pattern, and no "
                "sparse kernel could run",
                f"put it before {zeros.name}",
            )


def _after_zeros(planned: Planned) -> Iterator[tuple[Zeros, int, Stage]]:
    """Yields each stage after one that leaves zeros."""
    for zeros in planned.zeros:
        for at, stage in enumerate(planned.recipe.stages[zeros.at + 1 :], zeros.at + 1):
            yield zeros, at, stage


def _inputs_divide(planned: Planned) -> Iterator[PlanError]:
    """Without SlideSparse, which pads, a weight's inputs must be whole groups."""
    for export, keys in _sparse_exports(planned.recipe):
        if keys.get("sliding"):
            continue
        for zeros in planned.zeros:
            for name, inputs in _inputs(planned, zeros) if zeros.nm else ():
                if inputs % NATIVE.of:
                    yield PlanError(
                        f"export.{export.name}.sparse",
                        f"{name} has {inputs} inputs, not a multiple of {NATIVE.of}: its last "
                        "group is not whole, and no sparse kernel takes it",
                        f"cut that width to {inputs - inputs % 32} (a multiple of 32), or leave "
                        "`sparse` out",
                    )
                    return


def _gpu_skips_zeros(planned: Planned) -> Iterator[PlanError]:
    """Sparse tensor cores need a GPU of Ampere or later."""
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
    """TensorRT-RTX needs a GeForce or RTX GPU."""
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
    """A speed gate must not exceed what zeros can gain, on this machine or on any."""
    speed = planned.recipe.verify.speed
    if speed is None or speed.at_least is None or speed.at_least <= 1:
        return
    if not planned.zeros or planned.cuts_structure:
        return
    where = f"verify.speed.at_least: {speed.at_least:g}"
    sparse = {export.name: keys for export, keys in _sparse_exports(planned.recipe)}
    names = [zeros.name for zeros in planned.zeros]
    only = f"{' and '.join(names)} only put{'s' if len(names) == 1 else ''} zeros into weights"
    for export in planned.recipe.export:
        keys = sparse.get(export.name)
        if export.parameters().get("packed") == "sparse":
            share = max(zeros.share for zeros in planned.zeros)
            refused = beyond_reach(export.parameters(), share, speed.at_least)
            yield from [refused] if refused else []
        elif planned.machine.device == "cpu":
            yield PlanError(
                where,
                f"{only}, and no runtime is faster for them on a CPU: at 50 % the best kernels "
                "reach 0.26 to 0.94 times dense",
                "leave `at_least` out, remove blocks or widths as well, write `packed: sparse` in "
                "an exporter that has it (`ort_genai`, `onnx`), or run on a GPU that knows 2 of 4 "
                "with `sparse: true`",
            )
        elif keys is None:
            yield PlanError(
                where,
                f"{only}, and {export.name} as written here multiplies with them",
                "write `sparse: true` in an exporter that has it (`tensorrt`), or leave "
                "`at_least` out",
            )
        else:
            most, nm = max((_most(zeros.nm, keys), str(zeros.nm)) for zeros in planned.zeros)
            if most and speed.at_least > most:
                yield PlanError(
                    where,
                    f"is more than {nm} can gain: sparse tensor cores allow {most:.2f}x",
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
    """Lists the exports that ask for sparse kernels, with their keys."""
    for export in recipe.export:
        keys = export.parameters()
        if keys.get("sparse"):
            yield export, keys


def _needs_zeros(recipe: Recipe) -> bool:
    """Whether an export needs the zeros exactly where the pattern has them.

    Packed weights need them too, but take any that are left.
    """
    asked = ("sparse", "sliding")
    return any(export.parameters().get(key) for export in recipe.export for key in asked)


def _inside_native(nm: Nm) -> bool:
    """Whether every `nm` weight is 2:4 as well."""
    return nm.keep == 1 or (nm.keep == NATIVE.keep and nm.of % NATIVE.of == 0)


def is_rewritten(nm: Nm) -> bool:
    """Whether SlideSparse rewrites a pattern, which tensor cores do not take as it is."""
    return windows_for(nm) is not None and not _inside_native(nm)


def _most(nm: Nm | None, keys: Mapping[str, Any]) -> float:
    """The largest possible gain of sparse kernels for this pattern; 0 for none."""
    if nm is None:
        return 0.0
    windows = windows_for(nm)
    if not _inside_native(nm):
        return bound(windows) if keys.get("sliding") and windows else 0.0
    return bound(NATIVE)


def _puts_zeros(stage: Stage) -> bool:
    """Whether a stage uses a sparse method: one that has the key `nm`."""
    return stage.kind == "prune" and hasattr(stage.entry, "nm")


def _inputs(planned: Planned, zeros: Zeros) -> Iterator[tuple[str, int]]:
    """The matrices that a stage prunes, with their numbers of inputs at the end of the recipe."""
    targets = zeros.stage.entry.targets(planned.archs[zeros.at])
    roles = {tensor.role for tensor in targets}
    for tensor in linears(planned.after):
        if tensor.role in roles:
            yield tensor.name, inputs_of(planned.after, tensor)


def _keys(nm: Nm) -> str:
    return f"`nm: {{keep: {nm.keep}, of: {nm.of}}}`"
