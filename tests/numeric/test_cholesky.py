"""Damped Cholesky factors, against their products and where there is none at first."""

from __future__ import annotations

import pytest
import torch

from prune_export.errors import StageError
from prune_export.numeric.cholesky import damped_cholesky, solve_damped
from prune_export.pruning.latency import obs_structured


def indefinite(width: int = 6) -> torch.Tensor:
    """Sums of products that rounding has made indefinite: two inputs alike, and a little less."""
    rows = torch.randn(40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[:, 1] = rows[:, 0]
    found = rows.T @ rows
    found[0, 1] = found[1, 0] = found[0, 0] * 1.002
    return found


@pytest.mark.parametrize("reverse", [False, True])
def test_damping_grows_tenfold_until_there_is_a_factor(reverse: bool) -> None:
    hessian = indefinite()
    mean = float(hessian.diagonal().mean())
    lower, damping = damped_cholesky(hessian.clone(), 1e-4, mean, "here", reverse=reverse)
    assert damping == pytest.approx(1e-2)
    expected = hessian + damping * mean * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(lower @ lower.T, expected.flip(0, 1) if reverse else expected)


def test_a_hessian_that_is_not_finite_is_named() -> None:
    hessian = torch.full((3, 3), torch.nan)
    with pytest.raises(StageError, match=r"block 3, down\n.*damping 1\n"):
        damped_cholesky(hessian, 0.01, 1.0, "block 3, down")


def test_solve_gives_none_where_it_is_singular_and_leaves_the_matrix() -> None:
    matrix, wanted = indefinite(), torch.ones(2, 6, dtype=torch.float64)
    before = matrix.clone()
    assert solve_damped(matrix, wanted, 0.0) is None
    found = solve_damped(matrix, wanted, 10.0)
    assert found is not None
    assert torch.equal(matrix, before)
    torch.testing.assert_close(found @ (matrix + 10 * torch.eye(6)), wanted)


def test_structured_removal_gets_over_an_indefinite_hessian() -> None:
    weight = torch.ones(2, 6, dtype=torch.float64)
    found = obs_structured.removed(weight, indefinite(), [[i] for i in range(6)], [4])
    assert len(found.kept) == 4
    assert bool(found.weight.isfinite().all())
    with pytest.raises(StageError, match="o of block 2"):
        nan = torch.full((6, 6), torch.nan)
        obs_structured.removed(weight, nan, [[i] for i in range(6)], [4], "o of block 2")
