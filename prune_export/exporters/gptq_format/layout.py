"""The layout of GPTQ's safetensors: codes in words of 32 bits.

Of a linear layer with `in` inputs and `out` outputs, the first code in the lowest bits of a word:

    qweight  I32 [in * bits / 32, out]      codes, neighbours along the inputs in one word
    qzeros   I32 [groups, out * bits / 32]  zeros, neighbours along the outputs in one word
    scales   F16 [groups, out]
    g_idx    I32 [in]                       the group of each input

In the format `gptq` zeros are stored less one; that of code 0 would borrow from its neighbour. In
`gptq_v2` they are stored as they are.
Source: GPTQModel 7.7, `nn_modules/qlinear` and `utils/model.py`, and transformers' `GPTQConfig`.
"""

from __future__ import annotations

from typing import Final

import torch

from prune_export.grids import Grid

WORD: Final = 32
PARTS: Final = ("qweight", "qzeros", "scales", "g_idx")


def shapes(outputs: int, inputs: int, grid_groups: int, bits: int) -> dict[str, tuple[int, ...]]:
    """The shape of each part."""
    return {
        "qweight": (inputs * bits // WORD, outputs),
        "qzeros": (grid_groups, outputs * bits // WORD),
        "scales": (grid_groups, outputs),
        "g_idx": (inputs,),
    }


def packed(codes: torch.Tensor, grid: Grid) -> dict[str, torch.Tensor]:
    """Packs codes `[out, in]`; a symmetric grid as `gptq`, another as `gptq_v2`."""
    inputs = codes.shape[1]
    zeros = grid.zeros
    if zeros is None:
        zeros = torch.full(grid.scales.shape, grid.middle - 1, dtype=torch.uint8)
    return {
        "qweight": words(codes, grid.bits).T.contiguous(),
        "qzeros": words(zeros.T.contiguous(), grid.bits),
        "scales": grid.scales.half().T.contiguous(),
        "g_idx": (torch.arange(inputs) // grid.group_size).to(torch.int32),
    }


def unpacked(parts: dict[str, torch.Tensor], bits: int, *, less_one: bool) -> torch.Tensor:
    """The weights float32 `[out, in]` of packed parts."""
    codes = numbers(parts["qweight"].T.contiguous(), bits)
    zeros = numbers(parts["qzeros"], bits) + int(less_one)
    group = parts["g_idx"].long()
    return (codes.float() - zeros.float().T[:, group]) * parts["scales"].float().T[:, group]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes of the last dimension into int32, the first in the lowest bits."""
    grouped = codes.long().reshape(*codes.shape[:-1], -1, WORD // bits)
    shifts = torch.arange(0, WORD, bits)
    whole = (grouped << shifts).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).to(torch.int32)


def numbers(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes that words of int32 hold, along the last dimension."""
    shifts = torch.arange(0, WORD, bits)
    each: torch.Tensor = (stored.long()[..., None] >> shifts) & (2**bits - 1)
    return each.flatten(-2)
