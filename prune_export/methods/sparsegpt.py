"""Puts zeros one input after another, and lets the weights still to come make up for each.

For every matrix it solves the layer's least squares greedily: what a removed weight adds to the
error is spread over the later inputs by the inverse of their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import Edited, Further, Gram, ModelView, Site
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.methods import _obs, _sparse
from prune_export.methods._mask import Amount, summary


@dataclass(frozen=True)
class SparseGpt(_sparse.Calibrated):
    """Zero weights in blocks of columns, by what each costs, and update the others for it.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
    One-Shot", arXiv:2301.00774, algorithm 1.
    Differs: by default each matrix sees what the pruned earlier ones of its block give; counts are
    exact; weights that were zero stay zero; inputs that were never seen lose their weights first,
    but no more than were asked for; where the Cholesky factor does not exist, damping is raised and
    then it is an error, never silently magnitude pruning.
    """

    VERSION: ClassVar[str] = "1"

    damping: Annotated[
        float,
        Field(gt=0, le=1, description="Added to the Gram matrix's diagonal, times its mean."),
    ] = 0.01
    columns: Annotated[
        int, Field(ge=1, description="Inputs among which the least are found, without a pattern.")
    ] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nm is not None and self.columns != 128:
            raise PlanError(
                "columns",
                f"got {self.columns} beside `nm`, whose groups decide it",
                "leave out `columns`",
            )

    def statistics(self, arch: Arch) -> tuple[Further, ...]:
        own = _sparse.sweep_cost(arch, self.order, grams=True)
        return (*_sparse.Sparse.statistics(self, arch), own)

    def decide(self, model: ModelView) -> Decision:
        amounts, why = self.amounts(model)
        names = frozenset(tensor.name for tensor in self.targets(model.arch))
        editor = _Compensating(
            _sparse.key_of(self, amounts), names, amounts, self.damping, self.columns
        )
        swept = model.sweep(editor, self.order)
        raised = {
            f"{layer}.{site}": own["damping"]
            for layer, log in enumerate(swept.logs)
            for site, own in log.items()
            if own.get("damping", self.damping) != self.damping
        }
        more = {"raised_damping": raised} if raised else {}
        return _sparse.swept_decision(self, swept, {**why, **more})


@dataclass(frozen=True)
class _Compensating:
    """Prunes the matrices of a site with one Gram matrix and one factor of its inverse."""

    key: str
    targets: frozenset[str]
    amounts: Mapping[int, Amount]
    damping: float
    columns: int

    def watch(self, site: Site, width: int, device: str) -> Gram | None:
        """The Gram matrix of the inputs, where one of the site's matrices is pruned."""
        wanted = any(tensor.name in self.targets for tensor in site.tensors)
        return Gram(width, device) if wanted else None

    def edit(self, site: Site, weights: Mapping[str, torch.Tensor], seen: Gram) -> Edited:
        """The matrices with zeros in them, and their other weights made up for it."""
        chosen = [tensor.name for tensor in site.tensors if tensor.name in self.targets]
        where = f"block {site.layer}, {site.name}"
        factor = _obs.factor(seen.sums, self.damping, where)
        amount = self.amounts[site.layer]
        found = _obs.prune([weights[name] for name in chosen], factor, amount, self.columns)
        made, log = {}, {}
        for name, pruned in zip(chosen, found, strict=True):
            made[name] = pruned.weight
            log[name] = summary(pruned.weight, pruned.scores, pruned.mask)
        return Edited(made, {"tensors": log, "tokens": seen.tokens, "damping": factor.damping})
