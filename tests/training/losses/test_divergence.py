"""The divergences against their definitions, torch's and autograd, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.training.losses.divergence import divergence

KINDS: list[tuple[Any, float]] = [
    ("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9),
    ("jsd", 0.0), ("jsd", 1.0),
]  # fmt: skip


def rows(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = scale * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return made[0].log_softmax(-1), made[1]


def defined(kind: str, beta: float, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.kl_div(other, one, reduction="none", log_target=True).sum(-1)

    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(log_p, log_q)
    if kind == "reverse_kl" or beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def test_by_hand() -> None:
    # P = (1/2, 1/2), Q = (1/4, 3/4): KL(P, Q) = ln 2 - ln(3) / 2, its slope is Q - P.
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    loss, slope = divergence("forward_kl", log_p, log_q)
    assert loss.item() == pytest.approx(math.log(2) - math.log(3) / 2, rel=1e-6)
    assert slope.tolist() == [pytest.approx([-0.25, 0.25])]


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_value_and_slope_equal_the_definition_and_autograd(kind: Any, beta: float) -> None:
    log_p, u = rows(3)
    u.requires_grad_()
    expected = defined(kind, beta, log_p, u.log_softmax(-1))
    loss, slope = divergence(kind, log_p, u.detach().log_softmax(-1), beta)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-14)
    (by_autograd,) = torch.autograd.grad(expected.sum(), u)
    torch.testing.assert_close(slope, by_autograd, rtol=1e-10, atol=1e-13)


def test_a_jsd_by_hand() -> None:
    # Certain of different tokens, but for 2 of 10^9: all of ln 2.
    far = torch.tensor([[1 - 1e-9, 1e-9]], dtype=torch.float64).log()
    assert divergence("jsd", far, far.flip(-1))[0].item() == pytest.approx(math.log(2), abs=1e-6)
    # P = (1/2, 1/2), Q = (1/4, 3/4), M = (3/8, 5/8).
    log_p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    of_p = 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)
    of_q = 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    assert divergence("jsd", log_p, log_q)[0].item() == pytest.approx((of_p + of_q) / 2)


@given(st.integers(0, 10**6), st.floats(0.01, 30))
@settings(max_examples=40, deadline=None)
def test_bounds_and_symmetry(seed: int, scale: float) -> None:
    log_p, u = rows(seed, scale)
    log_q = u.log_softmax(-1)
    for kind, beta in KINDS:
        loss, slope = divergence(kind, log_p, log_q, beta)
        assert bool((loss >= 0).all())
        assert bool(loss.isfinite().all())
        # A constant added to all of u changes nothing.
        assert slope.sum(-1).abs().max() < 1e-9 * max(1.0, float(loss.max()))
        assert divergence(kind, log_p, log_p, beta)[0].abs().max() < 1e-12
    there, back = divergence("jsd", log_p, log_q)[0], divergence("jsd", log_q, log_p)[0]
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-12)
    assert bool((there <= math.log(2) + 1e-12).all())


def test_the_ends_of_a_jsd_are_the_two_kls_exactly() -> None:
    log_p, u = rows(9)
    log_q = u.log_softmax(-1)
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        for ours, theirs in zip(
            divergence("jsd", log_p, log_q, beta), divergence(kind, log_p, log_q), strict=True
        ):  # type: ignore[arg-type]
            assert torch.equal(ours, theirs)
