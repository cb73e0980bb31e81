"""Masks for healing: finds the zeros of a checkpoint to keep, and checks the result.

Nothing is asked of the method that made them, so that anybody's sparse model is healed like ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import torch

from prune_export.arch import Arch
from prune_export.calibrate import LINEAR_GROUPS, as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.errors import StageError
from prune_export.sparsity.nm import Nm
from prune_export.sparsity.slidesparse import holds
from prune_export.units import MIB

KeepZeros = Literal["auto"] | bool

PRUNED_SHARE: Final = 0.05
"""Exact zeros that make a matrix a pruned one. Trained matrices have none, or a dead channel."""

PATTERNS: Final = tuple(
    Nm(keep, of)
    for keep, of in ((1, 4), (2, 4), (4, 8), (8, 16), (4, 6), (6, 8), (3, 4), (8, 10), (14, 16))
)
"""Patterns that are looked for, the sparsest first."""

_WINDOW_BYTES: Final = 64 * MIB


def kept_zeros(source: Checkpoint, names: Iterable[str], keep: KeepZeros) -> dict[str, int]:
    """Finds the matrices whose zeros are kept, and counts the zeros of each.

    With `auto` those of which `PRUNED_SHARE` or more is zero, with `True` all that have one.
    """
    if keep is False:
        return {}
    found: dict[str, int] = {}
    for name in names:
        zeros = sum(int((rows == 0).sum()) for rows in _rows(source, name))
        size = prod(source.entries[name].shape)
        if zeros and (keep is True or zeros >= PRUNED_SHARE * size):
            found[name] = zeros
    return found


def refuse_filled(
    source: Checkpoint, result: Checkpoint, arch: Arch, names: Collection[str]
) -> dict[str, int]:
    """Refuses a result in which a zero of the source has been filled.

    Returns how many of the matrices hold which pattern, as before.

    Raises:
        StageError: a zero of one of the matrices is gone, or a pattern.
    """
    held: Counter[str] = Counter()
    for name in names:
        filled = 0
        for before, after in zip(_rows(source, name), _rows(result, name), strict=True):
            filled += int(((before == 0) & (after != 0)).sum())
        if filled:
            raise StageError(
                f"healing  {name}",
                f"{filled} weights that were zero are not after the merge, expected all to stay",
                "report this with the recipe",
            )
        pattern = _pattern(source, arch, name, PATTERNS)
        if pattern is not None:
            if _pattern(result, arch, name, (pattern,)) is None:
                raise StageError(
                    f"healing  {name}",
                    f"held {pattern} before, and does not after the merge",
                    "report this with the recipe",
                )
            held[str(pattern)] += 1
    return dict(held)


def _pattern(source: Checkpoint, arch: Arch, name: str, which: Iterable[Nm]) -> Nm | None:
    """Finds the first of these N:M patterns that a matrix has, if any."""
    tensor = arch.by_name[name]
    if tensor.role not in LINEAR_GROUPS:
        return None
    nonzero = as_matrix(tensor, source.read(name).float() != 0).T.numpy()  # [in, out]
    return next((pattern for pattern in which if holds(nonzero, pattern)), None)


def _rows(source: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """Yields a matrix in windows of rows, in a dtype that compares."""
    entry = source.entries[name]
    rows = entry.shape[0]
    step = max(1, _WINDOW_BYTES * rows // max(1, entry.nbytes))
    for start in range(0, rows, step):
        part = source.read_rows(name, start, min(rows, start + step))
        yield part if part.element_size() > 1 else part.float()


@dataclass(frozen=True)
class Packed:
    """A packed mask, one bit a weight, for a base that is quantized."""

    bits: torch.Tensor
    shape: tuple[int, int]

    @staticmethod
    def of(zero: torch.Tensor, device: str) -> Packed:
        """Packs a mask, bools `[out, in]`."""
        flat = zero.flatten()
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        bits = torch.zeros(len(padded), dtype=torch.uint8)
        for at in range(8):
            bits |= padded[:, at].to(torch.uint8) << at
        return Packed(bits.to(device), (zero.shape[0], zero.shape[1]))

    def zero(self) -> torch.Tensor:
        """Bools `[out, in]` where the matrix is zero."""
        rows, columns = self.shape
        found = torch.empty(len(self.bits), 8, dtype=torch.bool, device=self.bits.device)
        for at in range(8):
            found[:, at] = (self.bits & (1 << at)).bool()
        return found.view(-1)[: rows * columns].view(rows, columns)
