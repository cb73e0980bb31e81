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
from prune_export.methods import _sparse
from prune_export.methods._mask import Amount, Compare, put_zeros, summary, zeros
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
        logs, edits = {}, []
        for tensor in self.targets(model.arch):
            assert tensor.layer is not None
            value = partial(_pruned, model, tensor, amounts[tensor.layer], self.compare)
            weight = as_matrix(tensor, model.checkpoint.read(tensor.name))
            scores = weight.float().abs()
            mask = zeros(scores, amounts[tensor.layer], self.compare)
            logs[tensor.name] = summary(put_zeros(weight, mask), scores, mask)
            edits.append(Overwrite(tensor.name, value))
        return _sparse.decision(self, edits, logs, why)


def _pruned(model: ModelView, tensor: Tensor, amount: Amount, compare: Compare) -> torch.Tensor:
    """The tensor with its zeros, found again when it is written: cheaper than to keep a mask."""
    stored = as_matrix(tensor, model.checkpoint.read(tensor.name))
    mask = zeros(stored.float().abs(), amount, compare)
    return as_matrix(tensor, put_zeros(stored, mask)).contiguous()
