"""Codes as ONNX Runtime's `MatMulNBits` stores them: blocks of an output's inputs, low bits first.

Source: onnxruntime, docs/ContribOperators.md, `com.microsoft.MatMulNBits`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prune_export.grids import Grid


def packed_codes(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Packs codes `[out, in]` to uint8 `[out, blocks, block bytes]`; the last block is filled up.

    What fills it are codes of zero: they are multiplied with nothing, or with zero.
    """
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % grid.group_size))
    if grid.bits == 4:
        filled = filled[:, 0::2] | (filled[:, 1::2] << 4)
    return filled.reshape(len(codes), grid.scales.shape[1], -1).contiguous()


def packed_zeros(grid: Grid) -> torch.Tensor | None:
    """Packs zeros to uint8 `[out, bytes of a row]`; None of a symmetric grid."""
    if grid.zeros is None or grid.bits == 8:
        return grid.zeros
    filled = torch.nn.functional.pad(grid.zeros, (0, grid.zeros.shape[1] % 2))
    return (filled[:, 0::2] | (filled[:, 1::2] << 4)).contiguous()


def unpacked(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, node: dict[str, Any]
) -> np.ndarray:
    """The weights float32 `[out, in]` that a `MatMulNBits` node of these attributes computes with.

    `node` has K, N, bits and block_size; read from the runtime's description, not from what packs.
    """
    inputs, outputs, bits, block = (node[key] for key in ("K", "N", "bits", "block_size"))
    blocks = -(-inputs // block)
    each = _numbers(codes.reshape(outputs, -1), bits)[:, : blocks * block]
    middle = np.full((outputs, blocks), 2 ** (bits - 1), np.float32)
    if zeros is not None:
        middle = _numbers(zeros.reshape(outputs, -1), bits)[:, :blocks].astype(np.float32)
    steps = each.reshape(outputs, blocks, block).astype(np.float32) - middle[:, :, None]
    found = steps * scales.reshape(outputs, blocks, 1).astype(np.float32)
    whole: np.ndarray = found.reshape(outputs, -1)[:, :inputs]
    return whole


def _numbers(stored: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of rows of bytes, the low half of a byte first."""
    if bits == 8:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(len(stored), -1)
