"""The teacher of a student: beside it, or as answers that were kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prune_export.arch import Arch
from prune_export.calibrate import KeptAnswers
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_model
from prune_export.contracts import Work
from prune_export.errors import StageError
from prune_export.training.losses.distill_loss import Answers, distill_loss
from prune_export.training.losses.hidden import States, watched
from prune_export.training.losses.loss import next_token_loss
from prune_export.training.losses.objective import Distill
from prune_export.training.settings import Training


@dataclass(frozen=True)
class NextToken:
    """The loss where there is no teacher."""

    def loss(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        counted: torch.Tensor | None,
        answers: Answers | None,
    ) -> torch.Tensor:
        """The mean loss of windows `ids` whose logits a student gave."""
        del answers
        return next_token_loss(logits, ids, counted)

    def answers(self, ids: torch.Tensor, places: torch.Tensor) -> Answers | None:
        """There are none."""
        del ids, places
        return None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """None beside the student's."""
        return {}


@dataclass(frozen=True)
class Lessons:
    """The loss of a student that learns from a `model`, or from answers that were `kept`.

    With `states` hidden states are compared too.
    """

    how: Distill
    model: Any = None
    kept: KeptAnswers | None = None
    states: States | None = None

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained beside the student."""
        return self.states.parameters() if self.states else {}

    def loss(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        counted: torch.Tensor | None,
        answers: Answers | None,
    ) -> torch.Tensor:
        """The mean loss of windows `ids` whose logits a student gave, and a teacher's answers."""
        assert answers is not None
        loss = distill_loss(logits, answers, ids, counted, self.how)
        return loss if self.states is None else loss + self.states.loss(ids, counted)

    def answers(self, ids: torch.Tensor, places: torch.Tensor) -> Answers:
        """What the teacher says to windows `ids`, which stand at `places` among all."""
        if self.kept is not None:
            tokens, log_p = self.kept.of(places, str(ids.device))
            return Answers(ids=tokens, log_p=log_p)
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits
        return Answers(logits=logits.contiguous())


Objective = NextToken | Lessons


def lessons(
    distill: Distill | None, kept: int | None, work: Work
) -> tuple[KeptAnswers | None, Path | None]:
    """A teacher's answers, made first where `kept` says of how many tokens, or where its model is.

    Neither where there is no teacher.

    Raises:
        StageError: there is to be one, and none was given.
    """
    if distill is None:
        return None, None
    if work.teacher is None:
        raise StageError(
            "healing  objective",
            "is `distill`, and no teacher was given",
            "give `Work` a `teacher`, as a recipe's run does",
        )
    if kept is None:
        return None, work.teacher.path
    return KeptAnswers.open(work.teacher.answers(kept, distill.temperature)), None


def objective_of(
    distill: Distill | None,
    answers: KeptAnswers | None,
    teacher: Path | None,
    device: str,
    dtype: torch.dtype,
) -> Objective:
    """What a student is trained for, by answers that were kept or a teacher that is loaded."""
    if distill is None:
        return NextToken()
    if answers is not None or teacher is None:
        return Lessons(distill, kept=answers)
    return Lessons(distill, model=_beside(teacher, device, dtype))


@contextmanager
def comparing(
    goal: Objective,
    student: Sequence[torch.nn.Module],
    arch: Arch,
    settings: Training,
    dense: tuple[Path, tuple[int, ...] | None] | None,
    device: str,
) -> Iterator[Objective]:
    """An objective that compares hidden states too inside a `with`, where the settings ask for it.

    `student` are the student's blocks, `arch` its shapes, `dense` where its teacher is, and which
    of that one's blocks they were.

    Raises:
        StageError: it is not known which blocks to compare.
    """
    how = settings.distill.hidden if settings.distill else None
    if how is None or dense is None or not isinstance(goal, Lessons):
        yield goal
        return
    path, survived = dense
    opened = Checkpoint.open(path)
    other = opened.arch(ignore_keys=opened.full_config())
    blocks = list(goal.model.get_submodule(other.table.blocks))
    widths = (arch.sizes["residual"], other.sizes["residual"])
    with watched(
        how, student, blocks, widths, survived, seed=settings.seed, device=device
    ) as states:
        yield replace(goal, states=states)


def _beside(path: Path, device: str, dtype: torch.dtype) -> Any:
    """A teacher's model in the dtype that the student computes in."""
    where = {"": 0 if device == "cuda" else "cpu"}
    return load_model(path, dtype=dtype, device_map=where).requires_grad_(False).eval()
