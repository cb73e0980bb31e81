"""Iterative magnitude pruning with rewinding: finds a lottery ticket by repeated training.

It takes `rounds` + 1 trainings of the whole model in memory: for small models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import ExtraPass, ModelView
from prune_export.calibrate.streaming.block_loader import threads
from prune_export.calibrate.streaming.driver import PassDriver
from prune_export.calibrate.streaming.linear_groups import part_of
from prune_export.checkpoint.header import TORCH
from prune_export.contracts import Decision
from prune_export.errors import PlanError, StageError
from prune_export.pruning.sparse import sparse_method
from prune_export.pruning.sparse.lottery_ticket import TOKENS, Schedule, Student, drawn, train
from prune_export.pruning.sparse.masks import count_of, mask_of, smallest, summary
from prune_export.sparsity.nm import Nm
from prune_export.surgery import Overwrite

_HELD_OUT_SHARE: Final = 10


@dataclass(frozen=True)
class IterativeMagnitude(sparse_method.SparseMethod):
    """Train, zero the smallest weights of the whole model, rewind the rest; repeat; train again.

    The calibration windows are what is trained on, but for a tenth that losses are measured on.
    The starting point is the checkpoint, trained or not.

    Source: Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
    Networks", arXiv:1803.03635, section 2; rewinding to step k: Frankle et al., "Linear Mode
    Connectivity and the Lottery Ticket Hypothesis", arXiv:1912.05671, section 2.
    Differs: AdamW instead of SGD; the last round's removal brings the count to `sparsity` exactly.
    """

    VERSION: ClassVar[str] = "1"

    rounds: Annotated[
        int, Field(ge=1, description="Times that weights are removed, an equal share of the rest.")
    ] = 5
    steps: Annotated[int, Field(ge=1, description="Optimizer steps of one training.")] = 500
    rewind: Annotated[
        int, Field(ge=0, description="Step to whose weights, and learning rate, one goes back.")
    ] = 0
    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate of AdamW.")] = 3e-4
    batch: Annotated[int, Field(ge=1, description="Windows in an optimizer step.")] = 4
    seed: Annotated[int, Field(ge=0, description="Decides the order of windows, dropout.")] = 0
    control: Annotated[
        Literal["none", "random_mask", "reinit"],
        Field(
            description="What a ticket is compared with, made in its stead: as many zeros of each "
            "matrix at random places, or the ticket's zeros with weights drawn anew."
        ),
    ] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rewind >= self.steps:
            raise PlanError(
                "rewind",
                f"got {self.rewind}, expected a step before the last of {self.steps}",
                f"write `rewind: {self.steps // 20}`",
            )
        if self.permute:
            raise PlanError(
                "permute",
                "got true, but rounds would each want another order",
                "leave `permute` out",
            )
        if self.allocation != "uniform":
            raise PlanError(
                f"allocation: {self.allocation}",
                "the smallest weights of the whole model are removed, wherever they are",
                "leave `allocation` out",
            )

    @property
    def total_steps(self) -> int:
        """The optimizer steps of all trainings."""
        each = self.steps - self.rewind
        last = self.steps if self.control == "reinit" else each
        return self.rewind + self.rounds * each + last

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The cost of training: weights, gradients and AdamW's moments in memory, in float32."""
        size = arch.parameters()
        # Activations of all blocks, and the logits three times over.
        states = 24 * arch.layers * arch.sizes["residual"] + 3 * arch.sizes["vocab"]
        return (
            ExtraPass(
                forwards=3 * self.total_steps,
                samples=self.batch,
                ram_bytes=16 * size + 4 * TOKENS * states,
                disk_bytes=(self.rounds + 3) * 4 * size,
            ),
        )

    def decide(self, model: ModelView) -> Decision:
        context = model.calibration()
        held_out = max(1, context.tokens.samples // _HELD_OUT_SHARE)
        if context.tokens.samples < 2:
            raise StageError(
                "iterative_magnitude",
                f"got {context.tokens.samples} calibration window, expected at least 2: one to "
                "train on, one to measure with",
                "raise `samples` in `data.calibration`",
            )
        driver = PassDriver.of(model.checkpoint, context, model.arch)
        made_in = driver.folder("ticket", repr(self))
        folder = made_in.path
        folder.mkdir(parents=True, exist_ok=True)
        with (
            threads(context.machine.threads),
            context.told.task("Training, pruning, rewinding", self.total_steps) as task,
        ):
            student = Student(model.checkpoint, model.arch, context.machine.device)
            windows = context.tokens.ids
            rounds = self._rounds(student, windows[held_out:], windows[:held_out], folder, task)
        logs = self._stored(student, model, folder)
        del student
        file = folder / "made.safetensors"
        read: list[Callable[[], torch.Tensor]] = [
            partial(_read, file, tensor.name) for tensor in model.arch.stored()
        ]
        made_in.live_as_long_as(read[0])
        edits = tuple(
            Overwrite(tensor.name, value)
            for tensor, value in zip(model.arch.stored(), read, strict=True)
        )
        return sparse_method.decision(
            self, edits, logs, {"rounds": rounds, "control": self.control}
        )

    def _rounds(
        self,
        student: Student,
        windows: torch.Tensor,
        held_out: torch.Tensor,
        folder: Path,
        task: Any,
    ) -> list[dict[str, float]]:
        """Runs all rounds, which leave the ticket in `student`; gives each training's loss."""
        schedule = Schedule(self.steps, self.batch, self.learning_rate, self.seed)
        targets = self.targets(student.arch)
        log = [{"sparsity": 0.0, "loss_before_training": student.measured(held_out)}]
        train(
            student, windows, schedule, 0, self.rewind, file=folder / "start.safetensors", task=task
        )
        start = student.state()
        for done in range(self.rounds):
            file = folder / f"round{done}.safetensors"
            train(student, windows, schedule, self.rewind, self.steps, file=file, task=task)
            log.append(_entry(student, targets, student.measured(held_out)))
            student.masks = self._masks(student, targets, done + 1)
            student.load(start)
        first = self.rewind
        if self.control == "random_mask":
            student.masks = _shuffled(student.masks, self.seed, self.nm)
            student.load(start)
        elif self.control == "reinit":
            student.redraw(self.seed + 1)
            first = 0
        file = folder / "last.safetensors"
        train(student, windows, schedule, first, self.steps, file=file, task=task)
        log.append(_entry(student, targets, student.measured(held_out)))
        return log

    def _masks(
        self, student: Student, targets: tuple[Tensor, ...], after: int
    ) -> dict[str, torch.Tensor]:
        """Makes the masks after so many rounds; earlier zeros are among them, being smallest."""
        sizes = {tensor.name: student.matrix(tensor).abs() for tensor in targets}
        for name, mask in student.masks.items():
            sizes[name] = sizes[name].masked_fill(~mask, -1)
        if self.nm is not None:
            gone = -((self.nm.keep - self.nm.of) * after // self.rounds)
            keep = self.nm.of - gone
            if keep == self.nm.of:
                return {}
            return {name: mask_of(size, Nm(keep, self.nm.of)) for name, size in sizes.items()}
        assert self.sparsity is not None
        count = sum(size.numel() for size in sizes.values())
        left = (1 - self.sparsity) ** (after / self.rounds)
        remove = count_of(self.sparsity if after == self.rounds else 1 - left, count)
        flat = torch.cat([size.flatten() for size in sizes.values()])
        mask = smallest(flat[None], remove)[0].logical_not_()
        counts = [size.numel() for size in sizes.values()]
        parts = torch.split(mask, counts)  # type: ignore[no-untyped-call]
        return {
            name: part.view(size.shape)
            for (name, size), part in zip(sizes.items(), parts, strict=True)
        }

    def _stored(self, student: Student, model: ModelView, folder: Path) -> dict[str, Any]:
        """Writes the tensors of the result by stored names; gives the log of each matrix."""
        from safetensors.torch import save_file

        made = {}
        for tensor in model.arch.stored():
            dtype = getattr(torch, TORCH[model.checkpoint.entries[tensor.name].dtype])
            value = part_of(tensor, student.places[tensor.name].data)
            made[tensor.name] = value.to(dtype).cpu().contiguous().clone()
        partial_file = folder / "made.partial"
        save_file(made, partial_file)
        partial_file.replace(folder / "made.safetensors")
        logs = {}
        for tensor in self.targets(model.arch):
            weight = student.matrix(tensor)
            mask = student.masks.get(tensor.name, torch.ones_like(weight, dtype=torch.bool))
            logs[tensor.name] = summary(weight, weight.abs(), kept=mask)
        return logs


def _entry(student: Student, targets: tuple[Tensor, ...], loss: float) -> dict[str, float]:
    """One row of the log: the sparsity of the model and its loss."""
    weights = sum(student.matrix(tensor).numel() for tensor in targets)
    gone = sum(int((~mask).sum()) for mask in student.masks.values())
    return {"sparsity": gone / weights, "loss": loss}


def _shuffled(
    masks: Mapping[str, torch.Tensor], seed: int, nm: Nm | None
) -> dict[str, torch.Tensor]:
    """Shuffles masks: as many zeros in each matrix, at random places (inside an N:M pattern)."""
    found = {}
    with drawn(seed, "random mask"):
        for name, mask in masks.items():
            if nm is not None:
                found[name] = mask_of(torch.rand(mask.shape), nm).to(mask.device)
            else:
                order = torch.randperm(mask.numel()).to(mask.device)
                found[name] = mask.flatten()[order].view(mask.shape)
    return found


def _read(file: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as stored:
        found: torch.Tensor = stored.get_tensor(name)
    return found
