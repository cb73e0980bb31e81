"""OWL: distributes sparsity over blocks, with less where more of a block's scores are outliers."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import torch

from prune_export.arch import Tensor
from prune_export.calibrate import (
    LINEAR_GROUPS,
    Edited,
    InputNorms,
    LinearGroup,
    ModelView,
    as_matrix,
    linear_groups,
)


@dataclass(frozen=True)
class Allocation:
    """Each block's sparsity, and JSON about why."""

    sparsity: Mapping[int, float]
    log: Mapping[str, Any]


def allocate(
    model: ModelView, targets: Iterable[Tensor], sparsity: float, spread: float, outlier: float
) -> Allocation:
    """Distributes `sparsity` over blocks, less to those with more outliers among Wanda's scores.

    All matrices of a block are pooled, on the dense model: `D` is the share of scores above
    `outlier` times their mean, and a block keeps `2 spread (D - min D) / (max D - min D)` more than
    it would, less the mean of that.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", arXiv:2310.05175, section 3.2.
    Differs: the mean over blocks is weighed by their sizes, so that the total is exact where they
    differ.
    """
    norms = _norms(model)
    shares, sizes = {}, {}
    for layer, own in groupby(targets, key=lambda tensor: tensor.layer):
        assert layer is not None
        tensors = tuple(own)
        shares[layer] = _outliers(model, tensors, norms, outlier)
        sizes[layer] = sum(prod(model.arch.shape(tensor)) for tensor in tensors)
    found = spread_out(shares, sizes, sparsity, spread)
    log = {"outlier_shares": list(shares.values()), "sparsity_by_block": list(found.values())}
    return Allocation(found, {"owl": log | {"blocks": list(shares)}})


def spread_out(
    shares: Mapping[int, float], sizes: Mapping[int, int], sparsity: float, spread: float
) -> dict[int, float]:
    """Turns shares of outliers into a sparsity for each block; `sizes` are numbers of weights."""
    least, most = min(shares.values()), max(shares.values())
    scale = 2 * spread / (most - least) if most > least else 0.0
    more = {layer: scale * (share - least) for layer, share in shares.items()}
    total = sum(sizes.values())
    mean = sum(more[layer] * sizes[layer] / total for layer in more)
    return {layer: sparsity - own + mean for layer, own in more.items()}


def _outliers(
    model: ModelView,
    tensors: Iterable[Tensor],
    norms: Mapping[tuple[int | None, str, int | None], torch.Tensor],
    outlier: float,
) -> float:
    """Computes the share of a block's scores above `outlier` times their mean."""
    stored = [(tensor, model.checkpoint.read_finite(tensor.name)) for tensor in tensors]
    total, count, above = 0.0, 0, 0
    pairs = [
        (as_matrix(tensor, value), norms[tensor.layer, LINEAR_GROUPS[tensor.role], tensor.expert])
        for tensor, value in stored
    ]
    for weight, norm in pairs:
        total += float((weight.float().abs().sum(0, dtype=torch.float64) * norm).sum())
        count += weight.numel()
    limit = outlier * total / count
    for weight, norm in pairs:
        above += int(torch.count_nonzero(weight.float().abs() * norm > limit))
    return above / count


def _norms(model: ModelView) -> dict[tuple[int | None, str, int | None], torch.Tensor]:
    """Gathers the norm of each input channel, by layer, kind of linear group, and expert."""
    result = model.sequential(_Norms())
    found: dict[tuple[int | None, str, int | None], torch.Tensor] = {}
    for layer, log in enumerate(result.logs):
        for group in linear_groups(model.arch, layer):
            squares = np.frombuffer(base64.b64decode(log[group.name]["squares"]), np.float32)
            found[layer, group.kind, group.expert] = torch.from_numpy(squares.copy()).sqrt()
    return found


@dataclass(frozen=True)
class _Norms:
    """An editor that edits nothing, and logs the exact sums of squares of inputs."""

    key: str = "input norms 1"

    def watch(self, group: LinearGroup, width: int, device: str) -> InputNorms:
        del group
        return InputNorms(width, device)

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: InputNorms
    ) -> Edited:
        del group, weights
        squares = seen.sums.cpu().numpy().astype(np.float32)
        return Edited({}, {"squares": base64.b64encode(squares.tobytes()).decode("ascii")})
