"""Narrows MLPs and attentions to a measured speedup of the engine, at the least loss (ZipLM).

Engines of narrower models are built and timed first; so it is known what each width is worth on the
runtime that will be used. Inputs of `down` and `o` are then removed by optimal brain surgery, what
is left making up for them, while the calibration windows pass through the narrowed blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from prune_export import registry
from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView
from prune_export.contracts import Decision
from prune_export.errors import PlanError, did_you_mean
from prune_export.pruning.latency import narrowing, target_search, width_costs
from prune_export.pruning.latency.narrowing import Limits
from prune_export.recipe.search import Target
from prune_export.surgery import Edit, Keep, Overwrite


@dataclass(frozen=True)
class ZipLM:
    """Narrow MLPs and KV groups to a measured speed, compensated by optimal brain surgery.

    Source: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models",
    arXiv:2302.04089, section 3.
    Differs: by default all blocks get the same widths, so that stock classes load them, and the
    widths are chosen by the loss of the compensated model; with `uniform: false` each block has its
    own, found as in the paper and stored with zeros, which exporters trim. Under grouped queries a
    KV group goes with all of its query heads. The engine that comes out is measured, and corrected.
    """

    VERSION: ClassVar[str] = "1"

    sparsity: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Fraction of the FFN channels and KV groups to remove."),
    ] = None
    target: Annotated[
        Target | None,
        Field(description="A speed, measured on engines, or a size, to come to instead."),
    ] = None
    uniform: Annotated[
        bool, Field(description="The same widths in all blocks, for stock classes.")
    ] = True
    multiple_of: Annotated[
        int, Field(ge=1, description="FFN channels left are a multiple of this, or of less.")
    ] = 64
    tries: Annotated[
        int, Field(ge=1, description="Choices of widths that are made and judged by the loss.")
    ] = 16

    def __post_init__(self) -> None:
        if (self.sparsity is None) == (self.target is None):
            raise PlanError(
                "how much",
                f"got {'neither' if self.target is None else 'both'} `sparsity` and `target`, "
                "expected one of them",
                "write `target: {speedup: 1.5}`, or `sparsity: 0.25`",
            )
        if self.sparsity is not None and not self.uniform:
            raise PlanError(
                "uniform: false",
                "widths that differ are chosen to meet a target, got `sparsity`",
                "write `target: {parameters: 0.8}` or `target: {speedup: 1.5}` instead",
            )
        if self.target is not None and self.target.engine not in registry.names("exporters"):
            raise PlanError(
                "target  engine",
                f"got {self.target.engine!r}, which is not an exporter",
                did_you_mean(self.target.engine, registry.names("exporters")),
            )

    @property
    def times_machine(self) -> bool:
        """Whether engines are timed, so that another machine would come to other widths."""
        return self.target is not None and self.target.parameters is None

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        kv = self._limits(arch)[1]
        if self.target is None:
            forwards = 1
        elif self.uniform:
            forwards = 1 + min(self.tries, len(kv.sizes))
        else:
            forwards = 2 + self.tries
        outputs = [narrowing.output(arch, f"{axis}.0") for axis in narrowing.KIND_OF]
        inputs = max(arch.shape(one)[narrowing.input_dim(one)] for one in outputs)
        # The Hessian, and in float64 itself, its inverse and what updates that.
        ram = inputs**2 * (4 + 4 * 8)
        seconds = 0.0
        if self.target is not None and self.target.speedup is not None:
            seconds = width_costs.ENGINE_SECONDS * width_costs.engines(self._limits(arch))
        return (ExtraPass(forwards=forwards, ram_bytes=ram, suspends=True, seconds=seconds),)

    def _limits(self, arch: Arch) -> tuple[Limits, Limits]:
        return narrowing.limits(arch, self.multiple_of, stock=self.uniform)

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut; for a target, those of one that cuts FFN channels only."""
        kinds = self._limits(arch)
        if self.target is None:
            return narrowing.uniform(arch, self._share(kinds))
        sizes = target_search.affordable(
            kinds, width_costs.counted(arch, kinds), target_search.budget_of(self.target)
        )
        return narrowing.uniform(arch, sizes[0]) if self.uniform else arch

    def _share(self, kinds: tuple[Limits, Limits]) -> dict[str, int]:
        """Chooses the allowed widths nearest to the fraction asked for."""
        left = 1 - (self.sparsity or 0.0)
        sizes = {kind.axis: _nearest(kind.sizes, left * kind.whole) for kind in kinds}
        if all(sizes[kind.axis] == kind.whole for kind in kinds):
            raise PlanError(
                f"sparsity: {self.sparsity}",
                "is too little to remove anything",
                f"write `sparsity: {1 - kinds[0].sizes[1] / kinds[0].whole:.2f}` or more",
            )
        return sizes

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        kinds = self._limits(arch)
        if self.target is None:
            sizes = narrowing.in_all(arch, self._share(kinds))
            return self._decision(model, sizes, {})
        found = target_search.meet(
            model, kinds, self.target, uniform=self.uniform, tries=self.tries
        )
        return self._decision(model, found.sizes, found.log)

    def _decision(
        self, model: ModelView, sizes: Mapping[str, int], log: Mapping[str, Any]
    ) -> Decision:
        swept = model.sequential(narrowing.Narrower(model.arch, sizes))
        kept: dict[str, list[int]] = {}
        errors: dict[str, float] = {}
        for axis in sizes:
            name, _, layer = axis.partition(".")
            own = swept.logs[int(layer)][narrowing.KIND_OF[name]]
            kept[axis], errors[axis] = own["kept"], own["error"]
        edits: list[Edit] = [Overwrite(name, value) for name, value in swept.values()]
        if self.uniform:
            edits += [Keep(axis, tuple(index)) for axis, index in kept.items()]
        return Decision(
            edits, {"sizes": dict(sizes), "kept_positions": kept, "errors": errors, **log}
        )


def _nearest(sizes: Sequence[int], wanted: float) -> int:
    return min(sizes, key=lambda size: abs(size - wanted))
