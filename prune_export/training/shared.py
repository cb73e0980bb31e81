"""A training that several processes share: what each is told, and its part in it.

The leader measures, saves, merges and writes; the others build the same student and take part in
the steps alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from prune_export.calibrate import KeptAnswers
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.system.processes import Team, refuse_absent
from prune_export.training.full_weights import Whole, whole_model
from prune_export.training.layerdrop import left_out
from prune_export.training.loop import Run, own_randomness, train
from prune_export.training.model import Trainee, quiet, trainee
from prune_export.training.settings import Quantization, Settings, Training
from prune_export.training.state import State
from prune_export.training.teacher import Objective, comparing, objective_of


@dataclass(frozen=True)
class Lesson:
    """All that another process needs to train the same student: values, and places of files.

    `windows` int32 `[samples, length]` and what `counted` of them are those that are trained on;
    `names` the stored weights that are trained, or get an adapter; `zeros` those that keep theirs;
    `answers` are a teacher's, and `teacher` a model that runs beside the student, of whose blocks
    the student's were `blocks`, where that is known.
    """

    settings: Training
    quantization: Quantization | None
    checkpoint: Path
    names: Sequence[str]
    zeros: Mapping[str, int]
    run: Run
    windows: torch.Tensor
    counted: torch.Tensor | None
    answers: KeptAnswers | None
    teacher: Path | None
    blocks: tuple[int, ...] | None = None

    @property
    def dense(self) -> tuple[Path, tuple[int, ...] | None] | None:
        """The teacher that runs beside the student, and which of its blocks survived."""
        return None if self.teacher is None else (self.teacher, self.blocks)

    @property
    def goal(self) -> Objective:
        """What the student is trained for."""
        return objective_of(
            self.settings.distill, self.answers, self.teacher, self.run.device, self.run.dtype
        )


def share_lesson(work: Work, lesson: Lesson) -> None:
    """Lets the other processes of a team take part in what the leader is about to train.

    Raises:
        StageError: one of them is gone.
    """
    work.team.call(_take_part, replace(lesson, windows=lesson.windows.int()))


def _take_part(team: Team, lesson: Lesson) -> None:
    refuse_absent(team, lesson.checkpoint)
    source = Checkpoint.open(lesson.checkpoint)
    arch = source.arch(ignore_keys=source.full_config())
    nowhere = Path("never written to")
    machine = Machine(lesson.run.device, 0, 0, lesson.run.threads)  # type: ignore[arg-type]
    with own_randomness(lesson.run.threads), quiet():
        goal = lesson.goal
        student = student_of(
            lesson.settings, lesson.quantization, source, lesson.names, lesson.run, lesson.zeros
        )
        blocks, how = student.blocks(arch), lesson.settings
        with (
            left_out(student.model, blocks, how.layerdrop, in_tuple=arch.table.tuple_blocks),
            comparing(goal, blocks, arch, how, lesson.dense, lesson.run.device) as goal,
        ):
            train(
                student,
                lesson.windows.long(),
                lesson.settings,
                lesson.run,
                State(),
                work=Work(machine, Silent(), nowhere, team=team),
                key="",
                counted=lesson.counted,
                objective=goal,
            )


def student_of(
    settings: Training,
    quantization: Quantization | None,
    source: Checkpoint,
    names: Sequence[str],
    run: Run,
    zeros: Mapping[str, int],
) -> Trainee | Whole:
    """The model of `source` in training: with adapters on the weights `names`, or these themselves.

    Raises:
        StageError: transformers' model has no such weights.
    """
    if not isinstance(settings, Settings):
        return whole_model(
            source,
            names,
            device=run.device,
            dtype=run.dtype,
            gradient_checkpointing=run.gradient_checkpointing,
            keep_zeros=zeros,
        )
    return trainee(
        source,
        names,
        settings,
        quantization,
        device=run.device,
        dtype=run.dtype,
        gradient_checkpointing=run.gradient_checkpointing,
        keep_zeros=zeros,
    )
