"""Refits against least squares on the rows themselves, and a worked case."""

from __future__ import annotations

import pytest
import torch

from prune_export.pruning.linalg.refit import Products, refit


def products_of(rows: torch.Tensor, samples: int = 32) -> Products:
    """Products of `[samples * length, in]` rows, seen in two calls."""
    windows = rows.view(samples, -1, rows.shape[1])
    made = Products(rows.shape[1], "cpu", tokens=len(rows), samples=samples, whole=True)
    made.see(windows[: samples // 2])
    made.see(windows[samples // 2 :])
    return made


@pytest.mark.parametrize("width", [5, 500])
def test_products_are_those_of_the_rows_that_are_not_held_out(width: int) -> None:
    rows = torch.randn(32 * 16, width, generator=torch.Generator().manual_seed(0))
    made = products_of(rows)
    held = (torch.arange(32) % 8 == 7).repeat_interleave(16)
    torch.testing.assert_close(made.matrix(), rows[~held].T @ rows[~held], atol=1e-3, rtol=1e-4)
    assert torch.equal(made.held_out(), rows[held])
    assert made.rows == int((~held).sum())


def test_few_windows_hold_out_their_ends() -> None:
    rows = torch.arange(2.0 * 16 * 3).view(2, 16, 3)
    made = Products(3, "cpu", tokens=32, samples=2, whole=True)
    made.see(rows)
    assert torch.equal(made.held_out(), rows[:, 14:].flatten(0, 1))
    fitted = rows[:, :14].flatten(0, 1)
    torch.testing.assert_close(made.matrix(), fitted.T @ fitted)


def test_an_input_that_others_repeat_is_taken_over_by_them() -> None:
    """x2 = x0 + 2 x1, so without x2 the weights (1, 1, 1) become (2, 3, 0)."""
    rows = torch.randn(32 * 8, 2, generator=torch.Generator().manual_seed(1))
    rows = torch.cat([rows, rows @ torch.tensor([[1.0], [2.0]])], 1)
    found = refit(torch.ones(1, 3), torch.tensor([True, True, False]), products_of(rows))
    torch.testing.assert_close(found.weight, torch.tensor([[2.0, 3.0, 0.0]]), atol=1e-2, rtol=0)
    assert found.ridge == 1e-3
    assert found.error is not None
    assert found.error < 1e-5
    assert found.cut is not None
    assert found.cut > 0.1


def test_a_refit_is_ridge_regression_on_the_rows() -> None:
    random = torch.Generator().manual_seed(2)
    rows = torch.randn(32 * 8, 6, generator=random) @ torch.randn(6, 6, generator=random)
    weight, ridge = torch.randn(4, 6, generator=random), 0.05
    kept = torch.tensor([True, False, True, True, False, True])
    found = refit(weight, kept, products_of(rows), always=True, ridges=[ridge])
    fitted = rows[~(torch.arange(32) % 8 == 7).repeat_interleave(8)].double()
    # Rows of sqrt(damping) say that the change is to be small.
    damping = ridge * float(fitted[:, kept].square().sum(0).mean())
    system = torch.cat([fitted[:, kept], damping**0.5 * torch.eye(4, dtype=torch.float64)])
    wanted = torch.cat([fitted[:, ~kept] @ weight[:, ~kept].double().T, torch.zeros(4, 4)])
    change = torch.linalg.lstsq(system, wanted).solution.T
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[:, kept] = weight[:, kept].double() + change
    torch.testing.assert_close(found.weight.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_refit_towards_a_target_weighs_tokens() -> None:
    """Weighted ridge regression of the change on the kept inputs, half of the way to the target."""
    random = torch.Generator().manual_seed(4)
    rows = torch.randn(32 * 8, 6, generator=random) @ torch.randn(6, 6, generator=random)
    targets = torch.randn(32 * 8, 4, generator=random)
    weights = torch.rand(32 * 8, generator=random) + 0.1
    weight, ridge = torch.randn(4, 6, generator=random), 0.05
    kept = torch.tensor([True, False, True, True, False, True])
    made = Products(6, "cpu", tokens=len(rows), samples=32, whole=True)
    for part in (slice(0, 16), slice(16, 32)):
        made.see_with_target(
            rows.view(32, 8, 6)[part], targets.view(32, 8, 4)[part], weights.view(32, 8)[part]
        )
    found = refit(weight, kept, made, always=True, ridges=[ridge])
    held = (torch.arange(32) % 8 == 7).repeat_interleave(8)
    wanted = (rows @ weight.T + targets).double() / 2
    scales = weights.double().sqrt()[:, None]
    fitted = rows[~held][:, kept].double() * scales[~held]
    damping = ridge * float(fitted.square().sum(0).mean())
    system = torch.cat([fitted, damping**0.5 * torch.eye(4, dtype=torch.float64)])
    plain = (weight * kept).double()
    missing = (wanted - rows.double() @ plain.T)[~held] * scales[~held]
    change = torch.linalg.lstsq(system, torch.cat([missing, torch.zeros(4, 4)])).solution.T
    expected = plain.clone()
    expected[:, kept] += change
    torch.testing.assert_close(found.weight.double(), expected, atol=1e-4, rtol=1e-4)
    for said, matrix in ((found.error, expected), (found.cut, plain)):
        off = (rows[held].double() @ matrix.T - wanted[held]) * scales[held]
        whole = (wanted[held] * scales[held]).square().sum()
        assert said == pytest.approx(float(off.square().sum() / whole), rel=1e-4)


def test_where_a_refit_does_not_help_the_cut_stays_plain() -> None:
    """What is removed has nothing to do with the rest: a fit is to noise."""
    random = torch.Generator().manual_seed(3)
    rows = torch.randn(16 * 2, 24, generator=random)
    weight = torch.zeros(1, 24)
    weight[0, -1] = 1.0
    weight[0, 0] = 1.0
    kept = torch.arange(24) < 23
    made = products_of(rows, samples=16)
    found = refit(weight, kept, made, ridges=[1e-4])
    assert found.ridge is None
    assert found.error == found.cut
    assert torch.equal(found.weight, weight * kept)
    forced = refit(weight, kept, made, always=True, ridges=[1e-4])
    assert forced.ridge == 1e-4
    assert not torch.equal(forced.weight, weight * kept)


def test_nothing_seen_is_a_plain_cut() -> None:
    """An expert that no token is routed to."""
    made = Products(3, "cpu", tokens=100, samples=4, whole=False)
    made.see(torch.zeros(1, 0, 3))
    found = refit(torch.ones(2, 3), torch.tensor([True, False, True]), made, always=True)
    assert found.error is None
    assert torch.equal(found.weight, torch.tensor([[1.0, 0, 1], [1, 0, 1]]))
