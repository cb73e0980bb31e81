"""Writes a checkpoint's tensors as a graph's external data, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Final

import onnx
import torch

from prune_export.arch import Arch
from prune_export.calibrate import as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.errors import CheckpointError
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters.onnx.coding import Stored, coded
from prune_export.exporters.onnx.merge import parts
from prune_export.exporters.onnx.replicate import Stamped, Weight
from prune_export.exporters.onnx.trace import Trace
from prune_export.grids import Grid
from prune_export.progress import Progress

ALIGNMENT: Final = 4096
"""Tensors start on a page, so that a runtime can map them instead of reading them."""

_ONNX: Final = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}

_EXPERTS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "gate_up_proj": (("w1.weight", "w3.weight"), ("gate_proj.weight", "up_proj.weight")),
    "up_proj": (("up_proj.weight",),),
    "down_proj": (("w2.weight",), ("down_proj.weight",)),
}
"""How files spell one expert's part of a parameter that transformers stacks in memory."""


@dataclass(frozen=True)
class Source:
    """Reads torch parameters from a checkpoint, by its own names and fused layouts.

    `stored` gives the name in the files for a torch name, and `tied` for each parameter that shares
    its storage the others that do. With `trim`, what is read is what is left; `grids` are those of
    a quantized checkpoint whose codes are to be written.
    """

    checkpoint: Checkpoint
    stored: Mapping[str, str]
    tied: Mapping[str, tuple[str, ...]]
    trim: Trim | None = None
    grids: Grids | None = None

    @staticmethod
    def of(checkpoint: Checkpoint, trace: Trace) -> Source:
        """Makes the source for the model that was traced."""
        stored = {trace.parameter_of(name): name for name in checkpoint.entries}
        return Source(checkpoint, stored, trace.tied)

    def read(self, parameter: str, expert: int | None = None) -> torch.Tensor:
        """Reads a parameter, or one expert of a stacked one, in the dtype of the file.

        Raises:
            CheckpointError: the checkpoint does not hold it.
        """
        if len(merged := parts(parameter)) > 1:
            return torch.cat([self.read(part) for part in merged])
        for name in (parameter, *self.tied.get(parameter, ())):
            if expert is None and name in self.stored:
                return self._read(name)
        if expert is not None:
            return self._expert(parameter, expert)
        if parameter.rpartition(".")[2] in _EXPERTS:
            return torch.stack(list(self._all_experts(parameter)))
        raise CheckpointError(
            f"{self.checkpoint.path}  {parameter}",
            "is a parameter of this model, but no tensor here holds it",
            "config.json and the weights must be of the same model",
        )

    def left(self, parameter: str, expert: int | None, shape: Sequence[int]) -> list[list[int]]:
        """The positions left of each dimension of a torch parameter `shape`, or of one expert."""
        found = [list(range(size)) for size in shape]
        names = [n for n in (parameter, *self.tied.get(parameter, ())) if n in self.stored][:1]
        if expert is not None and names:
            return found  # of experts that are one tensor on disk nothing is trimmed
        if expert is not None:
            names = self._expert_names(parameter, expert)
        if self.trim is None or not names:
            return found
        for dim, positions in self.trim.kept(self.stored[names[0]]):
            found[dim] = positions
        if len(names) == 2:  # gate and up, one above the other, are cut alike
            half = shape[0] // 2
            top = [at for at in found[0] if at < half]
            found[0] = [*top, *(half + at for at in top)]
        return found

    def names_of(self, parameter: str, expert: int | None = None) -> list[str]:
        """The stored matrices that make up a parameter, or one expert of it, by their outputs."""
        if expert is not None:
            return [] if parameter in self.stored else self._expert_names(parameter, expert)
        found = []
        for part in parts(parameter):
            own = next((n for n in (part, *self.tied.get(part, ())) if n in self.stored), None)
            if own is None:
                return []
            found.append(self.stored[own])
        return found

    def codes(self, name: str) -> tuple[torch.Tensor, Grid]:
        """The codes uint8 `[out, in]` of a stored matrix that has a grid, and the grid.

        Raises:
            CheckpointError: it does not lie on its grid.
        """
        assert self.grids is not None
        grid = self.grids.read(name)
        matrix = as_matrix(self._arch.by_name[name], self.checkpoint.read(name))
        return self.grids.codes(name, matrix, grid), grid

    @cached_property
    def _arch(self) -> Arch:
        full = self.checkpoint.full_config()
        return Arch.from_config(full, ignore_keys=full.keys())

    def _read(self, name: str) -> torch.Tensor:
        values = self.checkpoint.read(self.stored[name])
        return self.trim.cut(self.stored[name], values) if self.trim else values

    def _expert(self, parameter: str, expert: int) -> torch.Tensor:
        if parameter in self.stored:  # all experts of a block, on disk too
            return self.checkpoint.read_rows(self.stored[parameter], expert, expert + 1)[0]
        return torch.cat([self._read(name) for name in self._expert_names(parameter, expert)])

    def _expert_names(self, parameter: str, expert: int) -> list[str]:
        stem, _, part = parameter.rpartition(".")
        for names in _EXPERTS.get(part, ()):
            paths = [f"{stem}.{expert}.{name}" for name in names]
            if all(path in self.stored for path in paths):
                return paths
        raise CheckpointError(
            f"{self.checkpoint.path}  {parameter}",
            f"expert {expert} is not stored under any name known here",
            "save the model with transformers (`save_pretrained`), then export it",
        )

    def _all_experts(self, parameter: str) -> Iterator[torch.Tensor]:
        stem = parameter.rpartition(".")[0] + "."
        numbers = {
            name.removeprefix(stem).partition(".")[0]
            for name in self.stored
            if name.startswith(stem)
        }
        for number in range(len(numbers)):
            yield self._expert(parameter, number)


def write(
    stamped: Stamped, source: Source, dtype: torch.dtype, out: Path, progress: Progress
) -> None:
    """Writes `model.onnx` and `model.onnx_data` into the directory `out`.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the graph expects.
    """
    graph = stamped.model.graph
    data = "model.onnx_data"
    with (
        (out / data).open("wb") as stream,
        progress.task("weights", len(stamped.weights)) as task,
    ):
        for weight in stamped.weights:
            for name, flat, kind, shape in _stored(weight, source, dtype):
                stream.write(b"\0" * (-stream.tell() % ALIGNMENT))
                start = stream.tell()
                stream.write(flat.numpy().data)
                proto = graph.initializer.add()
                proto.name, proto.data_type = name, kind
                proto.dims.extend(shape)
                proto.data_location = onnx.TensorProto.EXTERNAL
                length = stream.tell() - start
                for key, value in (("location", data), ("offset", start), ("length", length)):
                    proto.external_data.add(key=key, value=str(value))
            task.advance()
    (out / "model.onnx").write_bytes(stamped.model.SerializeToString(deterministic=True))


def decode_bytes(stamped: Stamped, dtype: torch.dtype, experts_visited: float) -> int:
    """Counts the weight bytes that one decode step of one sequence reads.

    Embedding rows are left out; of the experts, the fraction that a token visits is counted.
    """
    total = 0.0
    for weight in stamped.weights:
        if not weight.looked_up:
            size: float = dtype.itemsize
            if weight.coding is not None:
                size = weight.coding.bytes_a_weight(dtype.itemsize)
            visited = experts_visited if weight.expert is not None else 1.0
            total += prod(weight.shape) * size * visited
    return int(total)


def _stored(weight: Weight, source: Source, dtype: torch.dtype) -> Iterator[Stored]:
    values = _values(weight, source, dtype)
    if weight.coding is not None:
        yield from coded(weight, values, source)
    else:
        flat = values.reshape(-1).view(torch.uint8)
        yield weight.name, flat, _ONNX[values.dtype], tuple(values.shape)


def _values(weight: Weight, source: Source, dtype: torch.dtype) -> torch.Tensor:
    values = source.read(weight.parameter, weight.expert)
    shape = tuple(values.shape[::-1] if weight.transposed else values.shape)
    if shape != weight.shape:
        raise CheckpointError(
            f"{source.checkpoint.path}  {weight.parameter}",
            f"got shape {list(values.shape)}, expected the one of config.json "
            f"{list(weight.shape[::-1] if weight.transposed else weight.shape)}",
            "config.json and the weights must be of the same model",
        )
    values = values.to(dtype)
    return (values.t() if weight.transposed else values).contiguous()
