"""Zeroes the smallest weights; needs no data, and one matrix in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import ModelView, as_matrix
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.sparse import free_channels, sparse_method
from prune_export.pruning.sparse.masks import count_of, keep_only, mask_of, summary
from prune_export.pruning.sparse.threshold import Limit, limit_of
from prune_export.sparsity.nm import Nm
from prune_export.surgery import Overwrite

Find = Callable[[torch.Tensor], torch.Tensor]
"""Makes the mask, True where a weight is kept, of a matrix's scores."""


@dataclass(frozen=True)
class Magnitude(sparse_method.SparseMethod):
    """Zero the smallest weights of each matrix, row or group, or of the model.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
    arXiv:1506.02626, section 3.
    Differs: counts are exact where weights are equal; nothing is trained between rounds.
    """

    VERSION: ClassVar[str] = "1"

    compare: Annotated[
        Literal["row", "matrix", "model"],
        Field(description="Among what the least are found, without a pattern."),
    ] = "matrix"

    def predict(self, arch: Arch) -> Arch:
        if self.compare == "model" and (self.nm is not None or self.allocation != "uniform"):
            raise PlanError(
                "compare: model",
                f"got {'a pattern' if self.nm else 'an allocation'} beside it, which says how many "
                "weights each matrix keeps",
                "write `compare: matrix`, or `sparsity: …` alone",
            )
        return super().predict(arch)

    def decide(self, model: ModelView) -> Decision:
        finders, why = self._finders(model)
        logs, edits, orders = {}, [], {}
        channels = self.channels(model.arch)
        for tensor, find in finders:
            weight = as_matrix(tensor, model.checkpoint.read_finite(tensor.name))
            scores = weight.float().abs()
            free = channels.get(tensor.name)
            if free is not None and self.nm is not None:
                kept, orders[tensor.name] = free_channels.mask(free, scores, self.nm, "row")
                columns = free.columns(torch.tensor(orders[tensor.name]["order"]))
                find = partial(_in_order, columns, self.nm)
            else:
                kept = find(scores)
            logs[tensor.name] = summary(keep_only(weight, kept), scores, kept=kept)
            edits.append(Overwrite(tensor.name, partial(_pruned, model, tensor, find)))
        return sparse_method.permuted(self, model, tuple(edits), logs, why, orders)

    def _finders(self, model: ModelView) -> tuple[list[tuple[Tensor, Find]], Mapping[str, Any]]:
        """Pairs each matrix with the function that makes its mask; and JSON about how."""
        targets = self.targets(model.arch)
        found: list[tuple[Tensor, Find]] = []
        if self.compare != "model":
            amounts, why = self.amounts(model)
            for tensor in targets:
                assert tensor.layer is not None
                amount = amounts[tensor.layer]
                found.append((tensor, partial(mask_of, amount=amount, compare=self.compare)))
            return found, why

        def sizes() -> Iterator[torch.Tensor]:
            for tensor in targets:
                yield as_matrix(tensor, model.checkpoint.read_finite(tensor.name)).float().abs()

        assert self.sparsity is not None
        total = sum(prod(model.arch.shape(tensor)) for tensor in targets)
        limit = limit_of(sizes, count_of(self.sparsity, total))
        for tensor, scores in zip(targets, sizes(), strict=True):
            found.append((tensor, partial(_above, limit)))
            limit = limit.least(scores)[1]
        return found, {"limit": limit.value}


def _above(limit: Limit, scores: torch.Tensor) -> torch.Tensor:
    return limit.least(scores)[0].logical_not_()


def _in_order(columns: torch.Tensor, nm: Nm, scores: torch.Tensor) -> torch.Tensor:
    return free_channels.mask_in(columns, scores, nm, "row")


def _pruned(model: ModelView, tensor: Tensor, find: Find) -> torch.Tensor:
    """Masks a tensor when it is written: finding the mask again is cheaper than keeping it."""
    stored = as_matrix(tensor, model.checkpoint.read(tensor.name))
    kept = find(stored.float().abs())
    return as_matrix(tensor, keep_only(stored, kept)).contiguous()
