"""Units in tensors of every layout, against einsum and loops on the unfused tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prune_export.arch import Dims, Tensor
from prune_export.pruning.width.unit_layout import reordered, spread, summed

SIZES = {"kv.0": 2, "group.0": 3, "dim": 2, "residual": 5, "mlp.0": 4}
ARCH: Any = SimpleNamespace(sizes=SIZES)
HEADS = ("kv.0", "group.0")


def tensor(dims: str) -> Tensor:
    return Tensor("t", Dims.parse(dims), "role", 0)


def random(dims: str) -> torch.Tensor:
    shape = Dims.parse(dims).shape(SIZES)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_heads_are_summed_in_plain_fused_and_transposed_tensors() -> None:
    q, k = random("(kv.0 group.0 dim) residual"), random("(kv.0 dim) residual")
    of_q = q.view(2, 3, 2, 5).sum((2, 3))
    of_k = k.view(2, 2, 5).sum((1, 2))[:, None].expand(2, 3) / 3
    found = summed(q, tensor("(kv.0 group.0 dim) residual"), HEADS, ARCH)
    torch.testing.assert_close(found, of_q)
    torch.testing.assert_close(summed(k, tensor("(kv.0 dim) residual"), HEADS, ARCH), of_k)
    fused = "(kv.0 group.0 dim)+(kv.0 dim) residual"
    torch.testing.assert_close(summed(torch.cat([q, k]), tensor(fused), HEADS, ARCH), of_q + of_k)
    torch.testing.assert_close(
        summed(q.T, tensor("residual (kv.0 group.0 dim)"), HEADS, ARCH), of_q
    )
    three = random("residual (3 kv.0 dim)")
    torch.testing.assert_close(
        summed(three, tensor("residual (3 kv.0 dim)"), ("kv.0",), ARCH),
        three.view(5, 3, 2, 2).sum((0, 1, 3)),
    )
    assert summed(random("residual"), tensor("residual"), HEADS, ARCH) is None


def test_flags_reach_the_positions_of_their_units() -> None:
    flags = torch.tensor([[True, False, True], [False, False, False]])
    heads = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]).bool()
    keys = torch.tensor([1, 1, 0, 0]).bool()
    q = spread(flags, tensor("(kv.0 group.0 dim) residual"), HEADS, ARCH)
    assert torch.equal(q, heads[:, None])
    fused = spread(flags, tensor("(kv.0 group.0 dim)+(kv.0 dim) residual"), HEADS, ARCH)
    assert torch.equal(fused, torch.cat([heads, keys])[:, None])
    o = spread(flags, tensor("residual (kv.0 group.0 dim)"), HEADS, ARCH)
    assert torch.equal(o, heads[None])
    channels = torch.tensor([True, False, True, True])
    both = spread(channels, tensor("mlp.0+mlp.0 residual"), ("mlp.0",), ARCH)
    assert torch.equal(both, torch.cat([channels, channels])[:, None])
    third = spread(torch.tensor([True, False]), tensor("(kv.0 3 dim)"), ("kv.0",), ARCH)
    assert third.tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("fused", [False, True])
def test_heads_change_places_inside_their_groups(fused: bool) -> None:
    order = torch.tensor([[2, 0, 1], [0, 2, 1]])
    dims = "(kv.0 group.0 dim)+(kv.0 dim) residual" if fused else "(kv.0 group.0 dim) residual"
    values = random(dims)
    found = reordered(values, tensor(dims), order, 0, ARCH)
    heads, moved = values[:12].view(2, 3, 2, 5), found[:12].view(2, 3, 2, 5)
    for group in range(2):
        for place in range(3):
            assert torch.equal(moved[group, place], heads[group, order[group, place]])
    assert torch.equal(found[12:], values[12:])
