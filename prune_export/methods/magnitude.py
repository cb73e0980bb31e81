"""Puts zeros where weights are smallest. Needs no data, and one matrix in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Tensor
from prune_export.calibrate import ModelView, as_matrix
from prune_export.contracts import Decision
from prune_export.methods import _free_channels, _sparse
from prune_export.methods._mask import Amount, Compare, put_zeros, summary
from prune_export.surgery import Overwrite


@dataclass(frozen=True)
class Magnitude(_sparse.Sparse):
    """Zero the smallest weights of each matrix, row or group.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
    arXiv:1506.02626, section 3.
    Differs: counts are exact where weights are equal; nothing is trained between rounds.
    """

    VERSION: ClassVar[str] = "1"

    compare: Annotated[
        Compare, Field(description="Among what the least are found, without a pattern.")
    ] = "matrix"

    def decide(self, model: ModelView) -> Decision:
        amounts, why = self.amounts(model)
        logs, edits, orders = {}, [], {}
        channels = self.channels(model.arch)
        for tensor in self.targets(model.arch):
            assert tensor.layer is not None
            amount = amounts[tensor.layer]
            weight = as_matrix(tensor, model.checkpoint.read(tensor.name))
            scores = weight.float().abs()
            free = channels.get(tensor.name)
            mask, note = _free_channels.mask(free, scores, amount, self.compare)
            logs[tensor.name] = summary(put_zeros(weight, mask), scores, mask)
            columns = None
            if free is not None:
                orders[tensor.name] = note
                columns = free.columns(torch.tensor(note["order"]))
            value = partial(_pruned, model, tensor, amount, self.compare, columns)
            edits.append(Overwrite(tensor.name, value))
        return _sparse.permuted(self, model, tuple(edits), logs, why, orders)


def _pruned(
    model: ModelView,
    tensor: Tensor,
    amount: Amount,
    compare: Compare,
    columns: torch.Tensor | None,
) -> torch.Tensor:
    """The tensor with its zeros, found again when it is written: cheaper than to keep a mask."""
    stored = as_matrix(tensor, model.checkpoint.read(tensor.name))
    mask = _free_channels.zeros_in(columns, stored.float().abs(), amount, compare)
    return as_matrix(tensor, put_zeros(stored, mask)).contiguous()
