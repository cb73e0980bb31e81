"""How a graph stores matrices as codes: int8 or int4 with a scale for each block of inputs.

The graph dequantizes (`DequantizeLinear` with `block_size`), and ONNX Runtime fuses that with the
product into its `MatMulNBits`; so the graph stays one of standard operators. What the checkpoint
has on a grid is stored as these codes; the rest is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import onnx
import torch

from prune_export.grids import Grid, nearest_grid

if TYPE_CHECKING:
    from prune_export.exporters.onnx.replicate import Weight
    from prune_export.exporters.onnx.weights import Source

Stored = tuple[str, torch.Tensor, int, tuple[int, ...]]
"""A tensor to be written: its name, its bytes, its type in ONNX, its shape."""

_TYPES: Final = {
    (8, True): onnx.TensorProto.INT8,
    (8, False): onnx.TensorProto.UINT8,
    (4, True): onnx.TensorProto.INT4,
    (4, False): onnx.TensorProto.UINT4,
}
"""By bits, and whether the grid is symmetric: then codes are stored less the middle one."""


@dataclass(frozen=True)
class Coding:
    """The codes of a matrix: bits, how many inputs share a scale, and whether groups have zeros."""

    bits: int = 8
    block: int = 32
    zeros: bool = False

    @property
    def suffix(self) -> str:
        """What the name of the codes ends in."""
        return f"int{self.bits}"

    def bytes_a_weight(self, scale_bytes: int) -> float:
        """The bytes of a weight, with its share of scales and zeros."""
        shared = 8 * scale_bytes + (self.bits if self.zeros else 0)
        return (self.bits + shared / self.block) / 8


Chooser = Callable[[str, int | None], Coding]
"""Gives the coding of a torch parameter, or of one expert of it."""


def chooser(source: Source, plain: Coding, head: Coding, blocks: str) -> Chooser:
    """The coding of each matrix: its grid's, where the checkpoint has one of it.

    Else it is `plain` for those of the `blocks` (the path of their list), and `head` for the head.
    """

    def choose(parameter: str, expert: int | None) -> Coding:
        grid = grid_of(source, parameter, expert)
        if grid is not None:
            return Coding(grid.bits, grid.group_size, grid.zeros is not None)
        return plain if parameter.startswith(f"{blocks}.") else head

    return choose


def grid_of(source: Source, parameter: str, expert: int | None) -> Grid | None:
    """The grid of a parameter `[out, in]`; None where a part of it has none, or one of its own."""
    grids, names = source.grids, source.names_of(parameter, expert)
    if grids is None or not names or not all(name in grids for name in names):
        return None
    return Grid.stacked([grids.read(name) for name in names])


def coded(weight: Weight, values: torch.Tensor, source: Source) -> Iterator[Stored]:
    """Stores a matrix `[in, out]` of the graph as codes, scales and zeros."""
    assert weight.coding is not None
    bits, block = weight.coding.bits, weight.coding.block
    exact = _codes_of(source, weight)
    if exact is None and bits == 8:
        codes, scale = quantize(values, block)
        yield _whole(f"{weight.name}_int8", codes)
        yield _whole(f"{weight.name}_scale", scale)
        return
    if exact is None:
        grid = nearest_grid(values.T, bits, block, symmetric=True)
        exact = grid.codes(values.T), grid
    codes, grid = exact
    symmetric = grid.zeros is None
    shifted = (codes - grid.middle) & 2**bits - 1 if symmetric else codes
    yield _integers(f"{weight.name}_{weight.coding.suffix}", shifted.T, bits, symmetric=symmetric)
    yield _whole(f"{weight.name}_scale", grid.scales.T.contiguous())
    if grid.zeros is not None:
        yield _integers(f"{weight.name}_zero", grid.zeros.T, bits, symmetric=False)


def decoded(weight: Weight, values: torch.Tensor, source: Source, name: str) -> torch.Tensor:
    """What the graph computes with for a parameter `name`, or its expert: `[in, out]`.

    `values` are its weights, and `weight` the matrix of the graph that it is part of.
    """
    assert weight.coding is not None
    bits, block = weight.coding.bits, weight.coding.block
    if grid_of(source, weight.parameter, weight.expert) is not None:
        own = source.names_of(name, weight.expert)
        return torch.cat([grid.values(codes) for codes, grid in map(source.codes, own)]).T
    if bits == 8:
        return dequantize(*quantize(values, block), block)
    grid = nearest_grid(values.T, bits, block, symmetric=True)
    return grid.values(grid.codes(values.T)).T


def quantize(matrix: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes `[rows, columns]` to int8 with float32 scales `[ceil(rows / block), columns]`.

    Symmetric, by the largest magnitude: `matrix ≈ int8 * scale` of the element's block of rows.
    """
    rows, columns = matrix.shape
    whole = torch.nn.functional.pad(matrix.float(), (0, 0, 0, -rows % block))
    blocks = whole.reshape(-1, block, columns)
    scale = blocks.abs().amax(dim=1) / 127
    steps = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    return steps.round_().to(torch.int8).reshape(-1, columns)[:rows].contiguous(), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Dequantizes to the float32 `[rows, columns]` that the graph computes with."""
    return values.float() * scale.repeat_interleave(block, dim=0)[: len(values)]


def _codes_of(source: Source, weight: Weight) -> tuple[torch.Tensor, Grid] | None:
    grid = grid_of(source, weight.parameter, weight.expert)
    if grid is None:
        return None
    names = source.names_of(weight.parameter, weight.expert)
    return torch.cat([source.codes(name)[0] for name in names]), grid


def _whole(name: str, values: torch.Tensor) -> Stored:
    kinds = {torch.int8: onnx.TensorProto.INT8, torch.float32: onnx.TensorProto.FLOAT}
    return name, values.reshape(-1).view(torch.uint8), kinds[values.dtype], tuple(values.shape)


def _integers(name: str, codes: torch.Tensor, bits: int, *, symmetric: bool) -> Stored:
    flat = codes.contiguous().reshape(-1)
    if bits == 4:  # two to a byte, the first in its low half
        flat = torch.nn.functional.pad(flat, (0, len(flat) % 2))
        flat = flat[0::2] | (flat[1::2] << 4)
    return name, flat, _TYPES[bits, symmetric], tuple(codes.shape)
