"""Rounds weights input by input, and updates the later ones to make up for each (GPTQ).

On the Hessians that SparseGPT gathers, in one pass with one block in memory; with `sparsity` or
`nm` the same sweep also makes zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import (
    Edited,
    ExtraPass,
    Hessian,
    LinearGroup,
    ModelView,
    Order,
    SequentialResult,
    inputs_of,
)
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.grids import Grid
from prune_export.pruning.quantize.method import QuantizeMethod, decision
from prune_export.pruning.quantize.sweep import Asked, processing_order, quantize
from prune_export.pruning.sparse import obs_unstructured, sequential_cost
from prune_export.pruning.sparse.masks import summary
from prune_export.pruning.sparse.targets import check_widths
from prune_export.sparsity.nm import Nm
from prune_export.surgery import Overwrite


@dataclass(frozen=True)
class Gptq(QuantizeMethod):
    """Round weights input by input, and let later weights make up for what each rounding does.

    With `sparsity` or `nm`, weights become zero in the same sweep (SparseGPT's joint form); zeros
    that are there stay.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers", arXiv:2210.17323, algorithm 1; jointly with zeros: Frantar and Alistarh,
    "SparseGPT", arXiv:2301.00774 (joint sparsification and quantization); groups in the order of
    how heavy their inputs are: Gafni et al., "Dual Precision Quantization for Efficient and
    Accurate Deep Neural Networks Inference", arXiv:2505.14638.
    Differs: each matrix sees what the quantized earlier ones of its block give; scales are numbers
    of half precision; a group's range may be narrowed to what costs least by the same Hessian.
    """

    VERSION: ClassVar[str] = "1"

    act_order: Annotated[
        bool,
        Field(description="Take the groups of inputs with the largest activations first."),
    ] = True
    search: Annotated[
        bool,
        Field(description="Narrow a group's range where that costs less than its ends do."),
    ] = True
    sparsity: Annotated[
        float | None, Field(gt=0, lt=1, description="Fraction of the weights to make zero as well.")
    ] = None
    nm: Annotated[
        Nm | None,
        Field(description="A pattern of zeros to make as well, such as `{keep: 2, of: 4}`."),
    ] = None
    damping: Annotated[
        float,
        Field(gt=0, le=1, description="Added to the Hessian's diagonal, times its mean."),
    ] = 0.01
    order: Annotated[
        Order,
        Field(
            description="`sequential`: each matrix sees what earlier quantized ones of its block "
            "give, in one pass; `block`: all see the dense block."
        ),
    ] = "sequential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None and self.nm is not None:
            raise PlanError(
                "how many weights become zero",
                "got both of `sparsity` and `nm`, expected one or none",
                "write `nm: {keep: 2, of: 4}` alone, or `sparsity: 0.5`",
            )
        if self.nm is not None and self.group_size % self.nm.of:
            raise PlanError(
                "nm",
                f"got groups of {self.nm.of}, which groups of {self.group_size} with one scale "
                "cannot be cut into",
                "write `of: 4`, `8` or `16`",
            )

    def predict(self, arch: Arch) -> Arch:
        """The shapes stay.

        Raises:
            PlanError: the targets are not of this model, or the pattern does not fit.
        """
        if self.nm is not None:
            widths = {tensor.name: inputs_of(arch, tensor) for tensor in self.targets(arch)}
            check_widths(self.nm, widths)
        return super().predict(arch)

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The pass that `decide` runs; beside what SparseGPT's holds, the codes' errors."""
        own = sequential_cost.of(arch, self.order, hessians=True)
        return (replace(own, ram_bytes=own.ram_bytes + 2**25),)

    def decide(self, model: ModelView) -> Decision:
        names = frozenset(tensor.name for tensor in self.targets(model.arch))
        editor = _Rounding(f"{type(self).__name__} {self.VERSION} {self}", names, self)
        result = model.sequential(editor, self.order)
        groups = [group for log in result.logs for group in log.values()]
        tensors = {name: own for group in groups for name, own in group["tensors"].items()}
        more: dict[str, Any] = {
            "order": self.order,
            "mean_square_error": sum(own["loss"] for own in tensors.values()) / len(tensors),
        }
        if self.sparsity is not None or self.nm is not None:
            zeros, weights = (sum(own[key] for own in tensors.values()) for key in _COUNTS)
            digests = "".join(own["digest"] for own in tensors.values())
            more |= {
                "mask_digest": hashlib.sha256(digests.encode()).hexdigest(),
                "pattern": str(self.nm) if self.nm else f"{self.sparsity} unstructured",
                "sparsity": zeros / weights,
                "zeros": zeros,
                "weights": weights,
            }
        unseen = [name for group in groups if not group["tokens"] for name in group["tensors"]]
        if unseen:
            more["rounded_to_nearest_for_want_of_tokens"] = unseen
        edits = tuple(Overwrite(name, read) for name, read in result.values())
        grids = {name: partial(self._grid, result, name) for name in result.names}
        return decision(self, edits, grids, more | {"tensors": tensors})

    def _grid(self, result: SequentialResult, name: str) -> Grid:
        zeros = None if self.symmetric else result.read(f"{name}:zeros")
        return Grid(self.bits, self.group_size, result.read(f"{name}:scales"), zeros)

    @property
    def asked(self) -> Asked:
        """What the sweep is to do."""
        amount = self.nm if self.nm is not None else self.sparsity
        return Asked(self.bits, self.group_size, self.symmetric, self.search, amount)


_COUNTS = ("zeros", "weights")


@dataclass(frozen=True)
class _Rounding:
    """Quantizes the matrices of a linear group, which share a Hessian and its factored inverse."""

    key: str
    targets: frozenset[str]
    method: Gptq

    def watch(self, group: LinearGroup, width: int, device: str) -> Hessian | None:
        """Accumulates the Hessian for a linear group of which a matrix is quantized."""
        wanted = any(tensor.name in self.targets for tensor in group.tensors)
        return Hessian(width, device) if wanted else None

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Hessian
    ) -> Edited:
        """Quantizes the matrices of a group, and updates weights that are still to come."""
        method = self.method
        chosen = [tensor.name for tensor in group.tensors if tensor.name in self.targets]
        hessian = seen.sums
        order = torch.arange(len(hessian), device=hessian.device)
        if method.act_order:
            unit = method.nm.of if method.nm else 1
            order = processing_order(hessian.diagonal(), method.group_size, unit)
            hessian = hessian[order][:, order]
        where = f"block {group.layer}, {group.name}"
        factor = obs_unstructured.factor(hessian, method.damping, where)
        made, log, beside = {}, {}, {}
        own = [weights[name] for name in chosen]
        for name, found in zip(chosen, quantize(own, factor, order, method.asked), strict=True):
            made[name] = found.weight
            beside[f"{name}:scales"] = found.grid.scales
            if found.grid.zeros is not None:
                beside[f"{name}:zeros"] = found.grid.zeros
            log[name] = {"loss": found.loss}
            if method.asked.amount is not None:
                log[name] |= summary(found.weight, found.scores, kept=~found.mask)
        more = {"damping": factor.damping}
        return Edited(made, {"tensors": log, "tokens": seen.tokens, **more}, beside)
