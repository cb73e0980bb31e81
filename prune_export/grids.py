"""Quantization grids: the few values that each weight of a matrix may have.

In a group of neighbouring inputs of one output, a weight is `(code - zero) * scale`, with a code of
`bits` bits. Scales are half precision numbers, and zeros are codes: so a weight that is 0 is on
every grid, and runtimes that store scales in half precision compute with the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a matrix `[out, in]`: `scales` float32 and `zeros` uint8, both `[out, groups]`.

    A group is `group_size` neighbouring inputs; the last may have fewer. `zeros` is None where it
    is the middle code everywhere (a symmetric grid); a scale may then be negative.
    """

    bits: int
    group_size: int
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return int(2 ** (self.bits - 1))

    def codes(self, matrix: torch.Tensor) -> torch.Tensor:
        """The codes uint8 `[out, in]` nearest to a matrix `[out, in]`."""
        import torch

        scales, zeros = self._each(matrix.shape[1])
        steps = matrix.float() / torch.where(scales == 0, 1.0, scales)
        return (steps.round_() + zeros).clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The weights float32 `[out, in]` of codes; each is exact."""
        scales, zeros = self._each(codes.shape[1])
        return (codes.float() - zeros) * scales

    def error(self, matrix: torch.Tensor) -> float:
        """How far a matrix is from the grid, in steps: 0 on it, up to 0.5 between two codes."""
        import torch

        scales, _ = self._each(matrix.shape[1])
        off = (matrix.float() - self.values(self.codes(matrix))).abs()
        return float((off / torch.where(scales == 0, 1.0, scales).abs()).max())

    def rows(self, index: torch.Tensor) -> Grid:
        """The grid of some outputs."""
        zeros = None if self.zeros is None else self.zeros[index]
        return Grid(self.bits, self.group_size, self.scales[index], zeros)

    def like(self, other: Grid) -> bool:
        """Whether two grids have the same bits, group size, and kind of zeros."""
        return (self.bits, self.group_size, self.zeros is None) == (
            other.bits,
            other.group_size,
            other.zeros is None,
        )

    @staticmethod
    def stacked(grids: Sequence[Grid]) -> Grid | None:
        """The grid of matrices one above the other; None where they are of different kinds."""
        import torch

        first = grids[0]
        if not all(first.like(one) for one in grids):
            return None
        zeros = None
        if first.zeros is not None:
            zeros = torch.cat([one.zeros for one in grids if one.zeros is not None])
        scales = torch.cat([one.scales for one in grids])
        return Grid(first.bits, first.group_size, scales, zeros)

    def _each(self, width: int) -> tuple[torch.Tensor, torch.Tensor | int]:
        """The scale and the zero of each weight."""
        scales = self.scales.repeat_interleave(self.group_size, 1)[:, :width]
        if self.zeros is None:
            return scales, self.middle
        return scales, self.zeros.float().repeat_interleave(self.group_size, 1)[:, :width]


def nearest_grid(matrix: torch.Tensor, bits: int, group_size: int, *, symmetric: bool) -> Grid:
    """The grid of a matrix `[out, in]` that reaches just from the least to the largest weight."""
    import torch

    rows, width = matrix.shape
    whole = torch.nn.functional.pad(matrix.float(), (0, -width % group_size))
    scales, zeros = spanning(whole.reshape(rows, -1, group_size), bits, symmetric=symmetric)
    return Grid(bits, group_size, scales, zeros)


def spanning(
    groups: torch.Tensor, bits: int, *, symmetric: bool, part: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales float32 and zeros uint8 `[…]` of groups `[…, weights]`, over a part of their range.

    Symmetric: the weight of the largest magnitude, whatever its sign, becomes code 0, so that all
    codes are of use; the scale has the opposite sign. Of groups of zeros the scale is 1.
    """
    import torch

    least, most = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    if symmetric:
        largest = torch.where(-least >= most, least, most) * part
        scales = halves(-largest / 2 ** (bits - 1))
        return torch.where(scales == 0, 1.0, scales), None
    steps = 2**bits - 1
    scales = halves((most - least) * part / steps)
    scales = torch.where(scales == 0, 1.0, scales)
    zeros = (-least * part / scales).round_().clamp_(0, steps).to(torch.uint8)
    return scales, zeros


def halves(scales: torch.Tensor) -> torch.Tensor:
    """Rounds scales to half precision, as float32; what is too large becomes its largest number."""
    import torch

    most = torch.finfo(torch.float16).max
    return scales.clamp(-most, most).half().float()
