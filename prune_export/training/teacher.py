"""The teacher of a student: beside it, or as answers that were kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_export.calibrate import KeptAnswers
from prune_export.checkpoint.loading import load_model
from prune_export.contracts import Work
from prune_export.errors import StageError
from prune_export.training.distill_loss import Answers, distill_loss
from prune_export.training.loss import next_token_loss
from prune_export.training.objective import Distill


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


@dataclass(frozen=True)
class Lessons:
    """The loss of a student that learns from a `model`, or from answers that were `kept`."""

    how: Distill
    model: Any = None
    kept: KeptAnswers | None = None

    def loss(
        self,
        logits: torch.Tensor,
        ids: torch.Tensor,
        counted: torch.Tensor | None,
        answers: Answers | None,
    ) -> torch.Tensor:
        """The mean loss of windows `ids` whose logits a student gave, and a teacher's answers."""
        assert answers is not None
        return distill_loss(logits, answers, ids, counted, self.how)

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


def _beside(path: Path, device: str, dtype: torch.dtype) -> Any:
    """A teacher's model in the dtype that the student computes in."""
    where = {"": 0 if device == "cuda" else "cpu"}
    return load_model(path, dtype=dtype, device_map=where).requires_grad_(False).eval()
