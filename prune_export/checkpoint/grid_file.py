"""The grids of a quantized checkpoint: a file beside weights that lie on them.

The weights themselves are stored as floats, so that whoever loads the model needs nothing else;
`quantization.grid` holds what an exporter needs to write them as codes again, exactly. It is a
safetensors file: for each matrix NAME `NAME:scales` F16 and, where the grid is not symmetric,
`NAME:zeros` U8, both `[out, groups]`, and `NAME:form` I32, bits and group size. Its name ends in
another way, because runtimes read every `*.safetensors` in a directory as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prune_export.checkpoint.header import Entry, read_header
from prune_export.checkpoint.reader import Checkpoint, read_entry
from prune_export.errors import CheckpointError
from prune_export.grids import Grid

if TYPE_CHECKING:
    import torch

NAME: Final = "quantization.grid"
BITS: Final = (4, 8)
GROUP_SIZES: Final = (16, 32, 64, 128, 256)

_AGAIN: Final = "run the quantize stage again, or remove the file: the weights load without it"
_OFF: Final = {"F32": 1e-3, "F16": 0.13, "BF16": 0.5}
"""How far a stored weight may be from its grid, in steps: what rounding to its dtype does."""


def write_grids(out: Path, grids: Mapping[str, Callable[[], Grid]]) -> None:
    """Writes the grids of matrices, by stored name, beside the weights in `out`."""
    import torch
    from safetensors.torch import save_file

    held: dict[str, torch.Tensor] = {}
    for name, make in grids.items():
        grid = make()
        held[f"{name}:form"] = torch.tensor([grid.bits, grid.group_size], dtype=torch.int32)
        held[f"{name}:scales"] = grid.scales.half().contiguous()
        if grid.zeros is not None:
            held[f"{name}:zeros"] = grid.zeros.contiguous()
    half = out / f"{NAME}.partial"
    save_file(held, half)
    half.replace(out / NAME)


@dataclass(frozen=True)
class Grids:
    """The grids of an opened checkpoint's matrices, read one at a time, by stored name."""

    checkpoint: Checkpoint
    entries: Mapping[str, Entry]

    @staticmethod
    def of(checkpoint: Checkpoint) -> Grids | None:
        """The grids of a checkpoint; None if it was not quantized.

        Raises:
            CheckpointError: the file is damaged, or not of these weights.
        """
        file = checkpoint.path / NAME
        if not file.exists():
            return None
        entries = read_header(file)
        for name in {name.rpartition(":")[0] for name in entries}:
            if name not in checkpoint.entries or len(checkpoint.entries[name].shape) != 2:
                raise CheckpointError(f"{file}  {name}", "is no matrix of this model", _AGAIN)
        return Grids(checkpoint, entries)

    def __contains__(self, name: object) -> bool:
        return f"{name}:form" in self.entries

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(":form") for name in self.entries if name.endswith(":form"))

    def read(self, name: str) -> Grid:
        """The grid of a matrix that has one.

        Raises:
            CheckpointError: it cannot be one of this matrix.
        """
        import torch

        form = self._read(name, "form", "I32", (2,))
        bits, group_size = (int(number) for number in form)
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise CheckpointError(
                f"{self.checkpoint.path / NAME}  {name}",
                f"got {bits} bits in groups of {group_size}, expected {_or(BITS)} bits in groups "
                f"of {_or(GROUP_SIZES)}",
                _AGAIN,
            )
        described = self.entries.get(f"{name}:scales")
        shape = described.shape if described and len(described.shape) == 2 else (0, 0)
        scales = self._read(name, "scales", "F16", shape).float()
        zeros = None
        if f"{name}:zeros" in self.entries:
            zeros = self._read(name, "zeros", "U8", shape)
        sound = bool(torch.isfinite(scales).all())
        if not sound or (zeros is not None and int(zeros.max()) >= 2**bits):
            raise CheckpointError(
                f"{self.checkpoint.path / NAME}  {name}",
                "holds scales that are not finite, or zeros that are no codes",
                _AGAIN,
            )
        return Grid(bits, group_size, scales, zeros)

    def codes(self, name: str, matrix: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The codes uint8 `[out, in]` of a matrix as it is stored.

        Raises:
            CheckpointError: it does not lie on its grid.
        """
        groups = -(-matrix.shape[1] // grid.group_size)
        if tuple(grid.scales.shape) != (matrix.shape[0], groups):
            raise CheckpointError(
                f"{self.checkpoint.path / NAME}  {name}",
                f"got scales {list(grid.scales.shape)}, expected {[matrix.shape[0], groups]}",
                _AGAIN,
            )
        off = grid.error(matrix)
        if not off < _OFF.get(self.checkpoint.entries[name].dtype, 0.0):
            raise CheckpointError(
                f"{self.checkpoint.path}  {name}",
                f"is up to {off:.2g} steps off its grid in {NAME}: it was changed since",
                _AGAIN,
            )
        return grid.codes(matrix)

    def _read(self, name: str, part: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        entry = self.entries.get(f"{name}:{part}")
        if entry is None or entry.dtype != dtype or entry.shape != shape:
            raise CheckpointError(
                f"{self.checkpoint.path / NAME}  {name}:{part}",
                f"got {f'{entry.dtype} {list(entry.shape)}' if entry else 'nothing'}, "
                f"expected {dtype} {list(shape)}",
                _AGAIN,
            )
        return read_entry(entry, f"{name}:{part}")


def _or(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}"
