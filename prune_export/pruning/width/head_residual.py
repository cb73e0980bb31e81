"""Minitron's head compensation: a kept head gets its residual to a removed one of lower rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from prune_export.arch import Arch, Tensor
from prune_export.errors import PlanError
from prune_export.pruning.width.unit_layout import spread
from prune_export.pruning.width.width_sizes import shares_keys


def pairs(scores: torch.Tensor, keep: int) -> Iterator[tuple[int, int]]:
    """Pairs (kept, removed) heads by rank of score: i and 2K - i + 1 for i from 2K - L + 1 to K.

    The printed range of the paper, from 2K - L, would begin with a partner of rank L + 1.
    """
    order = torch.argsort(scores.flatten(), descending=True, stable=True).tolist()
    for rank in range(2 * keep - len(order) + 1, keep + 1):
        yield order[rank - 1], order[2 * keep - rank]


def check(arch: Arch, sizes: dict[str, int], compensate: object) -> None:
    """Refuses models and cuts for which the rule is not defined.

    Raises:
        PlanError: query heads share keys, more than half of the heads go, or a refit would follow.
    """
    if shares_keys(arch):
        raise PlanError(
            "head_residual",
            "needs query heads with keys and values of their own, which these share",
            "leave it out: the refit (`compensate`) makes up for removed heads in every model",
        )
    if compensate is not False:
        raise PlanError(
            "head_residual",
            "got `compensate`, which refits what it would change",
            "write `compensate: false`, or leave out `head_residual`",
        )
    heads = [axis for axis in sizes if axis.split(".")[0] == "kv"]
    for axis in heads:
        if 2 * sizes[axis] < arch.sizes[axis]:
            raise PlanError(
                "head_residual",
                f"keeps {sizes[axis]} of {arch.sizes[axis]} heads, expected half or more",
                "write `heads: 0.5` or less",
            )
    if not heads:
        raise PlanError("head_residual", "got true, but no heads are cut", "write `heads: 0.25`")


def moved(
    arch: Arch, axis: str, scores: torch.Tensor, keep: int, read: Callable[[str], torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Computes the new values, by name, of all tensors of a block's heads."""
    chosen = list(pairs(scores, keep))
    return {
        tensor.name: partial(_moved, arch, axis, tensor, chosen, read)
        for tensor in arch.using(axis)
    }


def _moved(
    arch: Arch,
    axis: str,
    tensor: Tensor,
    chosen: list[tuple[int, int]],
    read: Callable[[str], torch.Tensor],
) -> torch.Tensor:
    before = read(tensor.name)
    after = before.clone()
    (number,) = [n for n, dim in enumerate(tensor.dims.of) if any(axis in part for part in dim)]

    def places(head: int) -> torch.Tensor:
        flags = torch.arange(arch.sizes[axis]) == head
        return spread(flags, tensor, (axis,), arch).flatten().nonzero().flatten()

    for kept, removed in chosen:
        own = before.index_select(number, places(kept))
        other = before.index_select(number, places(removed))
        after.index_copy_(number, places(kept), own + (own - other))
    return after
