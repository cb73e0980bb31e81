"""The model as a pruning method sees it: shapes, weights, statistics, and further passes."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.passes.ablation import Ablations
from prune_export.calibrate.passes.gradients import GradientReader, Gradients, gradients
from prune_export.calibrate.passes.seam_refit import CutModel, Repaired, repair
from prune_export.calibrate.passes.seams import Seam
from prune_export.calibrate.passes.sequential import SequentialResult, run_sequential
from prune_export.calibrate.passes.sequential_state import Editor, Order
from prune_export.calibrate.passes.statistics import gather
from prune_export.calibrate.statistics.api import Statistic
from prune_export.calibrate.streaming.skip import OUTPUTS, Unit
from prune_export.checkpoint import Checkpoint
from prune_export.system.temporary import Temporary


@dataclass(frozen=True)
class ModelView:
    """A model's shapes, its weights (read on demand) and the statistics that were asked for."""

    arch: Arch
    checkpoint: Checkpoint
    results: Mapping[Statistic, Any]
    context: CalibrationContext | None = None

    def stat(self, statistic: Statistic) -> Any:
        """The result of a statistic that the method asked for.

        Raises:
            KeyError: the method did not ask for it in `statistics`.
        """
        return self.results[statistic]

    def gather(self, statistics: Sequence[Statistic]) -> Mapping[Statistic, Any]:
        """Gathers statistics in one more pass; announce it in `statistics` as `ExtraPass`.

        Raises:
            ValueError: the view was made without calibration data.
        """
        return gather(self.checkpoint, statistics, self.calibration(), arch=self.arch)

    def sequential(
        self,
        editor: Editor,
        order: Order = "sequential",
        *,
        loss: bool = False,
        dense: bool = False,
    ) -> SequentialResult:
        """Edits the model block by block, each on the outputs of the edited blocks before it.

        With `loss`, the edited model's loss as well; with `dense`, beside the dense model's states.

        Raises:
            ValueError: the view was made without calibration data.
        """
        return run_sequential(
            self.checkpoint,
            editor,
            self.calibration(),
            arch=self.arch,
            order=order,
            loss=loss,
            dense=dense,
        )

    def repair(self, seams: Collection[Seam], cut: CutModel) -> Repaired:
        """Refits, on the calibration windows, the projection before each seam of a cut.

        Raises:
            ValueError: the view was made without calibration data.
        """
        return repair(self.checkpoint, seams, cut, self.calibration(), arch=self.arch)

    def gradients(self, reader: GradientReader) -> Gradients:
        """Computes gradients of the loss over the calibration windows; `reader` says what is kept.

        Raises:
            ValueError: the view was made without calibration data.
        """
        return gradients(self.checkpoint, reader, self.calibration(), arch=self.arch)

    def ablations(
        self,
        samples: int | None = None,
        length: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Ablations:
        """Measures losses without units, on the first `samples` windows cut to `length` tokens.

        In `dtype`, by default that of a calibration pass.

        Raises:
            ValueError: the view was made without calibration data.
        """
        context = self.calibration().of_first(samples, length)
        return Ablations(self.checkpoint, context, arch=self.arch, dtype=dtype)

    def without(self, layers: Collection[int]) -> ModelView:
        """A view of the model without some blocks; no weight is read or copied.

        Statistics are to be gathered anew; blocks are numbered as they are left.
        """
        if not layers:
            return self
        names = self.arch.origin(self.arch.kept(layers))
        arch = self.arch.without(layers)
        entries = {new: self.checkpoint.entries[old] for new, old in names.items()}
        config = arch.to_config(self.checkpoint.config)
        cut = replace(self.checkpoint, config=config, entries=entries)
        return replace(self, arch=arch, checkpoint=cut, results={})

    def ablated(self, units: Collection[Unit]) -> ModelView:
        """A view of the model without the attention, or the MLP, of some blocks.

        What writes their outputs is read as zeros; no weight is read or copied.

        Raises:
            ValueError: the view was made without calibration data.
        """
        if not units:
            return self
        entries = dict(self.checkpoint.entries)
        roles = {role for own in OUTPUTS.values() for role in own}
        outputs = [tensor for tensor in self.arch.tensors if tensor.role in roles]
        size = max(entries[tensor.name].nbytes for tensor in outputs)
        scratch = self.calibration().scratch
        temporary = Temporary() if scratch is None else None
        folder = scratch or Path(temporary.path if temporary else "")
        holes = _holes(folder, size)
        for tensor in outputs:
            if any(
                unit.layer == tensor.layer and tensor.role in OUTPUTS[unit.part] for unit in units
            ):
                own = entries[tensor.name]
                entries[tensor.name] = replace(own, file=holes, start=0, stop=own.nbytes)
        checkpoint = replace(self.checkpoint, entries=entries)
        if temporary:
            weakref.finalize(checkpoint, temporary.close)
        return replace(self, checkpoint=checkpoint, results={})

    def calibration(self) -> CalibrationContext:
        """The context of further passes.

        Raises:
            ValueError: the view was made without calibration data.
        """
        if self.context is None:
            raise ValueError(
                "the view has no calibration data: announce `ExtraPass` in `statistics`"
            )
        return self.context


def _holes(folder: Path, size: int) -> Path:
    """A sparse file of zeros, which takes no room on the disk; one for each size."""
    path = folder / f"zeros-{size}"
    # It is one of the files by which a killed pass knows its model again: left as it is.
    if not path.exists() or path.stat().st_size != size:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(size)
    return path
