"""Cholesky factors of damped Hessians: more damping where needed, and an error where none helps."""

from __future__ import annotations

from typing import Final

import torch

from prune_export.errors import StageError

_MOST_DAMPING: Final = 1.0
_MORE: Final = 10.0


def damped_cholesky(
    hessian: torch.Tensor, damping: float, mean: float, where: str, *, reverse: bool = False
) -> tuple[torch.Tensor, float]:
    """Factors `hessian + damping * mean * I` `[in, in]`; the lower factor, and the damping used.

    The diagonal of `hessian` is overwritten. `mean` is that of its diagonal, of which
    `damping` is a fraction; where there is no factor it grows tenfold, up to 1. With `reverse`, all
    indices are reversed first.

    Raises:
        StageError: there is no factor with damping 1 either; `where` names the matrix.
    """
    diagonal = hessian.diagonal()
    added = 0.0
    while True:
        diagonal += (damping - added) * mean
        added = damping
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1) if reverse else hessian)
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            return lower, damping
        if damping >= _MOST_DAMPING:
            raise StageError(
                where,
                f"the Hessian of its inputs has no Cholesky factor with damping {damping:g}",
                "look for calibration states that are not finite, or exclude its role",
            )
        damping = min(_MORE * damping, _MOST_DAMPING)


def solve_damped(matrix: torch.Tensor, wanted: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Solves D (matrix + damping I) = wanted for D `[out, in]` in float64; None where singular."""
    damped = matrix.double()
    if damped is matrix:
        damped = damped.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    return torch.cholesky_solve(wanted.double().T, factor).T
