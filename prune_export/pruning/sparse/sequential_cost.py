"""Estimates the memory of sequential pruning, block by block, from shapes alone."""

from __future__ import annotations

from math import prod

import torch

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, Order, block_bytes, inputs_of, linear_groups


def of(arch: Arch, order: Order, *, hessians: bool = False, permutes: bool = False) -> ExtraPass:
    """Estimates what sequential pruning holds and writes; with `grams`, it holds Hessians.

    The matrices of a linear group are copied in float32; of one at a time there are scores, what
    finds their limit, and a mask. A block's new matrices wait to be stored. With Hessians, those of
    all groups of a block are held, one is being factored, and weights are changed in copies.
    """
    group_weights = matrix_weights = widest = squares = total = 0
    for layer in range(arch.layers):
        here = 0
        for group in linear_groups(arch, layer):
            sizes = [prod(arch.shape(tensor)) for tensor in group.tensors]
            group_weights = max(group_weights, sum(sizes))
            matrix_weights = max(matrix_weights, *sizes)
            width = inputs_of(arch, group.tensors[0])
            widest, here = max(widest, width), here + width**2
            total += sum(sizes)
        squares = max(squares, here)
    held = block_bytes(arch, torch.float32) + 4 * group_weights + 13 * matrix_weights
    if hessians:
        held += 4 * squares + 8 * widest**2 + 4 * group_weights + 8 * matrix_weights
    if permutes:
        # The scores of a matrix, input by input, and in two orders.
        held += 12 * matrix_weights
    if permutes and hessians:
        held += 4 * widest**2
    return ExtraPass(
        forwards=1 if order == "sequential" else 2,
        suspends=order == "sequential",
        ram_bytes=held,
        disk_bytes=_item_bytes(arch) * total,
    )


def _item_bytes(arch: Arch) -> int:
    """The bytes of a stored weight, as far as the config says."""
    dtype = str(arch.config.get("dtype") or arch.config.get("torch_dtype") or "float32")
    return 2 if dtype.rpartition(".")[2] in ("float16", "bfloat16") else 4
