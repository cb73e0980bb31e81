"""Measures the speed of narrower models before any weight is scored, for ZipLM.

Speed depends on shapes alone, so positions are cut without looking at them. Engines and times are
artifacts of the store: what a killed run, or another recipe, has measured is not measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prune_export import registry
from prune_export.arch import Arch
from prune_export.arch.roles import OUTPUT_PROJECTIONS
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.execution.context import RunContext
from prune_export.execution.engines import export_engine
from prune_export.execution.measure import engine_speed
from prune_export.execution.shapes import checkpoint_of_shapes
from prune_export.recipe import Export, Workload
from prune_export.store import Artifact
from prune_export.surgery import Edit, Keep, Overwrite


@dataclass(frozen=True)
class TimedEngines:
    """Measures engines of the model at `path`, cut to given sizes, against the dense one."""

    context: RunContext
    arch: Arch
    path: Path
    id: str

    def speedup(
        self, sizes: Mapping[str, int], engine: str, request: tuple[int, int, int]
    ) -> float:
        """Measures the decode speedup of an engine over the dense one.

        Where the sizes differ between blocks, what is cut is zeros that the exporter trims.
        """
        export = Export(engine, registry.find("exporters", engine)())
        dense = export_engine(
            self.context, export, self.path, self.id, of=", dense to compare with"
        )
        shaped = self._shaped(sizes)
        made = export_engine(self.context, export, shaped.path, shaped.id, of=", of these widths")
        batch, prompt, new = request
        workload = Workload(batch=batch, prompt=prompt, new=new)
        found = engine_speed(self.context, dense, made, workload)
        self.context.progress.say(f"an engine with {_told(sizes)}: {found:.2f}x")
        return found

    def _shaped(self, sizes: Mapping[str, int]) -> Artifact:
        return checkpoint_of_shapes(
            self.context,
            "widths",
            {"sizes": dict(sizes)},
            self.path,
            self.id,
            self.arch,
            self._edits(sizes),
            title="a model of these widths",
        )

    def _edits(self, sizes: Mapping[str, int]) -> list[Edit]:
        arch = self.arch
        try:
            for axis, size in sizes.items():
                arch = arch.resized(axis, size)
            arch.to_config(self.arch.config)
        except PlanError:
            return list(self._zeros(sizes))
        return [Keep(axis, tuple(range(size))) for axis, size in sizes.items()]

    def _zeros(self, sizes: Mapping[str, int]) -> Iterator[Edit]:
        """Zeroes inputs of output projections, so that exporters trim what leads there."""
        for axis, size in sizes.items():
            gone = range(size, self.arch.sizes[axis])
            for tensor in self.arch.using(axis):
                if tensor.role in OUTPUT_PROJECTIONS:
                    ((dim, positions),) = tensor.dims.kept(axis, gone, self.arch.sizes)
                    yield Overwrite(tensor.name, partial(self._zeroed, tensor.name, dim, positions))

    def _zeroed(self, name: str, dim: int, positions: list[int]) -> Any:
        import torch

        value = Checkpoint.open(self.path).read(name).clone()
        return value.index_fill_(dim, torch.tensor(positions), 0)


def _told(sizes: Mapping[str, int]) -> str:
    """Words the sizes of each axis: one, or the least and the most."""
    kinds: dict[str, set[int]] = {}
    for axis, size in sizes.items():
        kinds.setdefault(axis.split(".")[0], set()).add(size)
    parts = []
    for name, found in kinds.items():
        span = str(*found) if len(found) == 1 else f"{min(found)} to {max(found)}"
        parts.append(f"{name} {span}")
    return ", ".join(parts) or "nothing cut"
