"""Structured optimal brain surgeon (ZipLM): removes whole inputs of a matrix, one group at a time.

With `H` the damped Hessian `XᵀX` of the inputs and `R` its inverse, removing the inputs `S` of a
matrix `W` `[out, in]` raises the squared error by `tr(W_S (R_SS)^-1 W_S^T)`; the best that the
others can do is `W - W_S (R_SS)^-1 R_S`, and `R` becomes `R - R_S^T (R_SS)^-1 R_S`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Final

import torch

from prune_export.numeric.cholesky import damped_cholesky

_DAMPING: Final = 1e-4
"""Times the mean of the Hessian's diagonal."""

_STEPS: Final = 256
"""At most about this many times, scores are computed again while a matrix is emptied."""


@dataclass(frozen=True)
class Removal:
    """A narrowed matrix, and the removals that led to it.

    `weight` `[out, in]` is zero at the inputs that are gone; `kept` are the groups left, ascending.
    `errors` has, for each count of groups asked for, the norm of what the outputs change by over
    the norm of the outputs. `order` are the groups removed, the first one first.
    """

    weight: torch.Tensor
    kept: tuple[int, ...]
    order: tuple[int, ...]
    errors: Mapping[int, float] = field(default_factory=dict)


def removed(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    groups: Sequence[Sequence[int]],
    left: Iterable[int],
    where: str = "ziplm",
) -> Removal:
    """Removes groups of inputs down to the least of `left`; records the error at each count.

    `groups` share out the inputs of `weight` `[out, in]`; `hessian` is XᵀX `[in, in]` of these.
    Where a group is one input, those with the least scores go several at a time.

    Raises:
        StageError: the Hessian has no Cholesky factor; `where` names the matrix.
    """
    wanted = sorted({*left}, reverse=True)
    members = torch.tensor(groups, device=weight.device)
    state = _State(weight.double(), hessian.double(), members, where)
    whole = float((state.weight @ hessian.double() * state.weight).sum())
    errors: dict[int, float] = {}
    order: list[int] = []
    lost = 0.0
    alone = state.members.shape[1] == 1
    most = max(1, len(groups) // _STEPS) if alone else 1
    for count in wanted:
        while len(groups) - len(order) > count:
            step = min(most, len(groups) - len(order) - count)
            chosen = state.least(step)
            lost += state.remove(chosen)
            order += chosen
        errors[count] = sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
    kept = tuple(sorted(set(range(len(groups))) - set(order)))
    return Removal(state.weight.to(weight.dtype), kept, tuple(order), errors)


class _State:
    """A matrix, the inverse Hessian of the remaining inputs, and which remain."""

    def __init__(
        self, weight: torch.Tensor, hessian: torch.Tensor, members: torch.Tensor, where: str
    ) -> None:
        # What is always zero is worth nothing, whatever the damping says.
        self.weight = weight * (hessian.diagonal() > 0)
        self.members = members
        """`[groups, inputs of each]`."""
        mean = float(hessian.diagonal().mean())
        if mean == 0:  # nothing was seen
            self.inverse = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
        else:
            lower, _ = damped_cholesky(hessian.clone(), _DAMPING, mean, where)
            self.inverse = torch.cholesky_inverse(lower)
        self.gone = torch.zeros(len(members), dtype=torch.bool, device=weight.device)

    def least(self, count: int) -> list[int]:
        """Chooses the groups that cost least to remove one by one; of equal ones the first."""
        scores = self._scores()
        scores[self.gone] = torch.inf
        return [int(group) for group in scores.argsort(stable=True)[:count]]

    def _scores(self) -> torch.Tensor:
        if self.members.shape[1] == 1:
            inputs = self.members[:, 0]
            squares = self.weight[:, inputs].square().sum(0)
            return squares / self.inverse.diagonal()[inputs].clamp_min(1e-300)
        found = torch.full(self.gone.shape, torch.inf).to(self.weight)
        for group in (~self.gone).nonzero()[:, 0].tolist():
            found[group] = self._cost(self.members[group])
        return found

    def _cost(self, inputs: torch.Tensor) -> torch.Tensor:
        part = self.weight[:, inputs]
        return (part @ self._own(inputs) * part).sum()

    def _own(self, inputs: torch.Tensor) -> torch.Tensor:
        own = self.inverse[inputs][:, inputs]
        found: torch.Tensor = torch.linalg.inv((own + own.T) / 2)
        return found

    def remove(self, groups: list[int]) -> float:
        """Removes groups together, and returns by how much the squared error rises."""
        inputs = self.members[groups].flatten()
        own = self._own(inputs)
        part = self.weight[:, inputs]
        moved = part @ own
        rise = float((moved * part).sum())
        rows = self.inverse[inputs]
        self.weight -= moved @ rows
        self.inverse -= rows.T @ (own @ rows)
        self.weight[:, inputs] = 0
        self.inverse[inputs] = 0
        self.inverse[:, inputs] = 0
        self.gone[groups] = True
        return rise
