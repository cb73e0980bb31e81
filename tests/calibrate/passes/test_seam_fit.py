"""Refits of one projection against least squares on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from prune_export.calibrate.passes import seam_fit
from prune_export.calibrate.passes.seam_fit import Moments, mended

IN, OUT, ROWS = 6, 4, 40


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(*, bias: bool = False, held: int = 8) -> tuple[Moments, list[torch.Tensor]]:
    """Moments of rows whose lacks are a linear function of them, and some noise."""
    rows = random(ROWS, IN, seed=0) @ random(IN, IN, seed=1)
    lacks = rows @ random(IN, OUT, seed=2) + 2.0 * bias + 0.1 * random(ROWS, OUT, seed=3)
    weights = random(ROWS, seed=4).square() + 0.1
    moments = Moments(IN, OUT, "cpu", bias=bias, held_tokens=held)
    for part in (slice(0, 10), slice(10, ROWS - held)):
        moments.see(rows[part], lacks[part], weights[part])
    if held:
        moments.hold(rows[-held:], lacks[-held:], weights[-held:])
    return moments, [rows, lacks, weights]


def by_rows(
    given: list[torch.Tensor], ridge: float, keep: torch.Tensor, bias: bool, fitted: int
) -> torch.Tensor:
    """Each output's change by least squares over its own inputs; `[out, in (+ 1)]`."""
    rows, lacks, weights = (one[:fitted].double() for one in given)
    rows = torch.cat([rows, torch.ones(fitted, 1).double()], 1) if bias else rows
    scaled = rows * weights.sqrt()[:, None]
    damping = ridge * float(scaled[:, :IN].square().sum(0).mean())
    found = torch.zeros(OUT, rows.shape[1], dtype=torch.float64)
    for out in range(OUT):
        own = torch.cat([keep[out], torch.ones(int(bias), dtype=torch.bool)])
        count = int(own.sum())
        system = torch.cat([scaled[:, own], damping**0.5 * torch.eye(count).double()])
        wanted = torch.cat([lacks[:, out] * weights.sqrt(), torch.zeros(count).double()])
        found[out, own] = torch.linalg.lstsq(system, wanted[:, None]).solution[:, 0]
    return found


PATTERNS = {
    "full": torch.ones(OUT, IN, dtype=torch.bool),
    "columns": torch.tensor([True, False, True, True, False, True]).repeat(OUT, 1),
    "scattered": random(OUT, IN, seed=5) > -0.3,
    "rows": torch.tensor([True, False, True, True])[:, None].repeat(1, IN),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_change_is_weighted_ridge_regression_where_weights_are_not_zero(
    pattern: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seam_fit, "RIDGES", (0.05,))
    keep = PATTERNS[pattern]
    weight = random(OUT, IN, seed=6) * keep
    moments, given = seen(bias=bias)
    found = mended(weight, moments)
    expected = by_rows(given, 0.05, keep, bias, ROWS - 8)
    assert found.change is not None
    assert found.ridge == 0.05
    torch.testing.assert_close(found.change.double(), expected[:, :IN], atol=2e-3, rtol=2e-3)
    assert not bool(found.change[~keep].any()), "zeros are kept"
    assert (found.bias is not None) == bias
    if found.bias is not None:
        torch.testing.assert_close(found.bias.double(), expected[:, IN], atol=2e-3, rtol=2e-3)


def test_the_error_is_that_of_held_out_rows() -> None:
    moments, (rows, lacks, weights) = seen()
    found = mended(random(OUT, IN, seed=6), moments)
    assert found.change is not None
    for change, told in ((torch.zeros(OUT, IN), found.before), (found.change, found.after)):
        off = (lacks - rows @ change.T)[-8:].square() * weights[-8:, None]
        assert told == pytest.approx(float(off.mean()), rel=1e-4)
    assert found.after is not None
    assert found.before is not None
    assert found.after < 0.1 * found.before


def test_what_generalizes_to_nothing_is_not_taken() -> None:
    moments = Moments(IN, OUT, "cpu", bias=False, held_tokens=8)
    moments.see(random(8, IN, seed=0), random(8, OUT, seed=1), torch.ones(8))
    moments.hold(random(8, IN, seed=2), torch.zeros(8, OUT), torch.ones(8))
    found = mended(random(OUT, IN, seed=3), moments)
    assert found.change is None
    assert found.ridge is None
    assert found.before == found.after == 0.0


def test_inputs_that_are_always_zero_change_nothing() -> None:
    moments = Moments(IN, OUT, "cpu", bias=False, held_tokens=0)
    moments.see(torch.zeros(8, IN), random(8, OUT, seed=1), torch.ones(8))
    assert mended(random(OUT, IN, seed=3), moments).change is None


def test_few_zeros_are_there_by_chance() -> None:
    """One of 24 weights is less than a twentieth: it may change like the others."""
    weight = random(OUT, IN, seed=6)
    weight[1, 2] = 0.0
    found = mended(weight, seen()[0])
    assert found.change is not None
    assert bool(found.change[1, 2])
