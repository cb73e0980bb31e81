"""Zeroes weights by importance relative to their row and column, and by input norm (RIA).

Taking weights relative to their row and column keeps whole channels from being lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Tensor
from prune_export.calibrate import InputNorms, ModelView
from prune_export.contracts import Decision
from prune_export.pruning.sparse import sparse_method
from prune_export.pruning.sparse.masks import Compare


@dataclass(frozen=True)
class Ria(sparse_method.CalibratedSparseMethod):
    """Zero the weights with the least relative importance x (norm of input)^a.

    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", ICLR 2024, section 3.1.
    Differs: by default each matrix sees what the pruned earlier ones of its block give; counts are
    exact where scores are equal.
    """

    VERSION: ClassVar[str] = "1"

    power: Annotated[
        float, Field(ge=0, description="Exponent of the input's norm; 0 ignores the data.")
    ] = 0.5
    compare: Annotated[
        Compare, Field(description="Among what the least are found, without a pattern.")
    ] = "matrix"

    def decide(self, model: ModelView) -> Decision:
        def own(weight: torch.Tensor, seen: InputNorms, tensor: Tensor) -> torch.Tensor:
            del tensor
            return relative_importance(weight).mul_((seen.sums / seen.tokens).pow(self.power / 2))

        return sparse_method.zero_least(self, model, own, self.compare)


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """Scores weights `[out, in]`: |weight| over its column's sum, plus |weight| over its row's."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    rows, columns = size.sum(1, keepdim=True), size.sum(0, keepdim=True)
    return size / columns.clamp_min(tiny) + size / rows.clamp_min(tiny)
