"""Attention by plain products gives what torch's kernel gives, as exactly as bfloat16 allows."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional

from prune_export.training import attention
from prune_export.training.attention import PlainAttention, makes_scores, score_bytes
from prune_export.training.loop import Run


def asked(heads: int, groups: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(2, length, count, 8).to(dtype).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    ]


def passed(
    dtype: torch.dtype, *, plain: bool, heads: int = 6, groups: int = 6, scale: float | None = None
) -> list[torch.Tensor]:
    """The outputs and the gradients of queries, keys and values."""
    given = asked(heads, groups, 24, dtype)
    with PlainAttention() if plain else nullcontext():
        out = functional.scaled_dot_product_attention(
            *given, is_causal=True, scale=scale, enable_gqa=heads != groups
        )
    out.backward(torch.randn(out.shape).to(dtype))
    return [out, *(one.grad for one in given if one.grad is not None)]


@pytest.mark.parametrize(("heads", "groups", "scale"), [(6, 6, None), (6, 2, None), (4, 1, 0.3)])
def test_as_near_to_float32_as_torchs_kernel(heads: int, groups: int, scale: float | None) -> None:
    def run(dtype: torch.dtype, plain: bool) -> list[torch.Tensor]:
        return passed(dtype, plain=plain, heads=heads, groups=groups, scale=scale)

    exact = run(torch.float32, False)
    for true, kernel, own in zip(
        exact, run(torch.bfloat16, False), run(torch.bfloat16, True), strict=True
    ):
        assert own.dtype == torch.bfloat16
        assert own.shape == true.shape
        off = (own.float() - true).norm() / true.norm()
        assert off < 2 * (kernel.float() - true).norm() / true.norm() + 1e-3


@pytest.mark.parametrize(
    "other",
    [
        {"is_causal": False},
        {"is_causal": True, "dropout_p": 0.1},
        {"attn_mask": torch.ones(24, 24, dtype=torch.bool).tril()},
    ],
)
def test_what_it_does_not_know_goes_to_the_kernel(
    other: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_attended", None)
    with PlainAttention():
        functional.scaled_dot_product_attention(*asked(2, 2, 24, torch.bfloat16), **other)
        functional.scaled_dot_product_attention(*asked(2, 2, 24, torch.float32), is_causal=True)


def test_in_autocast_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings leave float32 queries there, which autocast narrows for the kernel."""
    expected = passed(torch.float32, plain=False)[0]
    called = list[torch.dtype]()
    attended = attention._attended

    def told(*args: torch.Tensor, **named: object) -> torch.Tensor:
        called.extend(one.dtype for one in args)
        return attended(*args, **named)

    monkeypatch.setattr(attention, "_attended", told)
    queries, keys, values = asked(6, 6, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), PlainAttention():
        found = functional.scaled_dot_product_attention(
            queries, keys, values.bfloat16(), is_causal=True
        )
    assert called == 3 * [torch.bfloat16]
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0.03)


def test_only_for_short_windows_in_bfloat16_on_a_cpu() -> None:
    assert makes_scores("cpu", 2, 1024)
    assert not makes_scores("cpu", 2, 1025)
    assert not makes_scores("cpu", 4, 512)
    assert not makes_scores("cuda", 2, 512)
    run = Run("cpu", 1, "bfloat16", 1, False, 1)
    assert run.plain_attention(512)
    # What is recomputed is so in the backward pass.
    assert not Run("cpu", 1, "bfloat16", 1, True, 1).plain_attention(512)


def test_the_softmax_is_what_is_kept() -> None:
    kept = list[torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with PlainAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        functional.scaled_dot_product_attention(*asked(6, 2, 24, torch.bfloat16), is_causal=True)
    square = {one.data_ptr(): one.nbytes for one in kept if one.shape[-2:] == (24, 24)}
    assert sum(square.values()) == 2 * 24 * score_bytes(6, 24)
