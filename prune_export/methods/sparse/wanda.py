"""Zeroes the weights with the least |weight| x norm of input, row by row (Wanda).

One forward pass and no update of weights: the cheapest method that holds up at half of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prune_export.arch import Tensor
from prune_export.calibrate import InputNorms, ModelView
from prune_export.contracts import Decision
from prune_export.pruning.sparse import sparse_method


@dataclass(frozen=True)
class Wanda(sparse_method.CalibratedSparseMethod):
    """Zero the weights with the least |weight| x norm of input, in each row or group.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, section 3.
    Differs: by default each matrix sees what the pruned earlier ones of its block give, its norms
    corrected from some tokens (ADR 0019), which saves the second forward pass; counts
    are exact where scores are equal.
    """

    VERSION: ClassVar[str] = "2"

    def decide(self, model: ModelView) -> Decision:
        return sparse_method.zero_least(self, model, score, corrects=True)


def score(weight: torch.Tensor, seen: InputNorms, tensor: Tensor | None = None) -> torch.Tensor:
    """Scores weights `[out, in]`: |weight| times the root mean square of its input over tokens."""
    del tensor
    return weight.abs().mul_((seen.sums / seen.tokens).sqrt())
