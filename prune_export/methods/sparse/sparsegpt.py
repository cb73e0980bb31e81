"""Zeroes weights column by column, and updates the later columns to make up for each (SparseGPT).

For every matrix it solves the layer-wise least squares greedily: what a removed weight adds to the
error is spread over the later inputs by the inverse of the layer's Hessian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import Edited, ExtraPass, Hessian, LinearGroup, ModelView
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.sparse import (
    free_channels,
    obs_unstructured,
    sequential_cost,
    sparse_method,
)
from prune_export.pruning.sparse.free_channels import Channels
from prune_export.pruning.sparse.masks import Amount, summary
from prune_export.sparsity.nm import Nm


@dataclass(frozen=True)
class SparseGpt(sparse_method.CalibratedSparseMethod):
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
        Field(gt=0, le=1, description="Added to the Hessian's diagonal, times its mean."),
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

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        own = sequential_cost.of(arch, self.order, hessians=True, permutes=self.permute)
        return (*sparse_method.SparseMethod.statistics(self, arch), own)

    def decide(self, model: ModelView) -> Decision:
        amounts, why = self.amounts(model)
        names = frozenset(tensor.name for tensor in self.targets(model.arch))
        editor = _Compensating(
            sparse_method.key_of(self, amounts),
            names,
            amounts,
            self.damping,
            self.columns,
            self.channels(model.arch),
        )
        swept = model.sequential(editor, self.order)
        raised = {
            f"{layer}.{group}": own["damping"]
            for layer, log in enumerate(swept.logs)
            for group, own in log.items()
            if own.get("damping", self.damping) != self.damping
        }
        more = {"raised_damping": raised} if raised else {}
        return sparse_method.sequential_decision(self, model, swept, {**why, **more})


@dataclass(frozen=True)
class _Compensating:
    """Prunes the matrices of a linear group, which share one Hessian and its factored inverse."""

    key: str
    targets: frozenset[str]
    amounts: Mapping[int, Amount]
    damping: float
    columns: int
    channels: Mapping[str, Channels]

    def watch(self, group: LinearGroup, width: int, device: str) -> Hessian | None:
        """Accumulates the Hessian for a linear group of which a matrix is pruned."""
        wanted = any(tensor.name in self.targets for tensor in group.tensors)
        return Hessian(width, device) if wanted else None

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Hessian
    ) -> Edited:
        """Prunes the matrices of a group, and updates their remaining weights."""
        chosen = [tensor.name for tensor in group.tensors if tensor.name in self.targets]
        where = f"block {group.layer}, {group.name}"
        amount, hessian, places, orders = self.amounts[group.layer], seen.sums, None, {}
        own = [weights[name] for name in chosen]
        if chosen and chosen[0] in self.channels:
            # A group whose channels are free has one matrix.
            places, orders[chosen[0]] = _placed(self.channels[chosen[0]], own[0], hessian, amount)
            hessian, own = hessian[places][:, places], [own[0][:, places]]
        factor = obs_unstructured.factor(hessian, self.damping, where)
        made, log = {}, {}
        for name, pruned in zip(
            chosen, obs_unstructured.prune(own, factor, amount, self.columns), strict=True
        ):
            log[name] = summary(pruned.weight, pruned.scores, kept=pruned.kept)
            made[name] = pruned.weight
            if places is not None:
                made[name] = torch.empty_like(pruned.weight)
                made[name][:, places] = pruned.weight
        more = {"damping": factor.damping, "orders": orders}
        return Edited(made, {"tensors": log, "tokens": seen.tokens, **more})


def _placed(
    channels: Channels, weight: torch.Tensor, hessian: torch.Tensor, amount: Amount
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Permutes free input channels by Wanda's scores: old place by new, and JSON about it."""
    assert isinstance(amount, Nm)
    scores = weight.abs() * hessian.diagonal().clamp_min(0).sqrt()
    order = channels.best(scores, amount)
    places = channels.columns(order).to(weight.device)
    return places, free_channels.noted(order, scores, places, amount)
