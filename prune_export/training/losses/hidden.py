"""Hidden states of a student beside its teacher's: which blocks, and how far they are apart.

Distances are relative, token by token: states of late blocks are many times those of early ones,
and some tokens' (the first of a window) many times those of others, so that a plain mean of squares
would be about these alone. Where a student's states are narrower, a linear map of its own for each
pair of blocks leads to the teacher's; it is trained too, and not part of the result.

Source: Jiao et al., TinyBERT (1909.10351), equation 8, for the map; Muralidharan et al., Compact
Language Models (2407.14679), section 3, for losses between blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from prune_export.errors import StageError
from prune_export.training.losses.loss import counted_weights
from prune_export.training.losses.objective import Hidden

_LEAST: Final = 1e-6


def paired(
    how: Hidden, student: int, teacher: int, survived: Sequence[int] | None
) -> tuple[tuple[int, int], ...]:
    """Which blocks are compared, (student's, teacher's); models have so many.

    `survived` has the teacher's block that each of the student's was.

    Raises:
        StageError: that is not known, or there is no last block but one.
    """
    where = "healing  objective.distill.hidden"
    if how.by == "last_2":
        if min(student, teacher) < 2:
            raise StageError(where, "got a model of one block, expected two", "leave it out")
        return ((student - 2, teacher - 2),)
    if survived is None or len(survived) != student:
        raise StageError(
            where,
            "it is not known which of the teacher's blocks each of the student's was",
            "write `hidden: {by: last_2}`",
        )
    return tuple(enumerate(survived))


@dataclass
class States:
    """What leaves the watched blocks of both models, and the maps between them."""

    how: Hidden
    pairs: tuple[tuple[int, int], ...]
    maps: Mapping[int, torch.nn.Parameter] = field(default_factory=dict)
    student: dict[int, torch.Tensor] = field(default_factory=dict)
    teacher: dict[int, torch.Tensor] = field(default_factory=dict)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The maps by name, to be trained."""
        return {f"hidden.{block}.map": value for block, value in self.maps.items()}

    def loss(self, ids: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        """The weighted mean distance over pairs and over positions whose next token counts."""
        weight = counted_weights(ids, counted)
        total = torch.zeros((), device=ids.device)
        for one, other in self.pairs:
            own, wanted = self.student[one].float(), self.teacher[other].float()
            if one in self.maps:
                own = functional.linear(own, self.maps[one])
            own, wanted = own.flatten(0, 1), wanted.flatten(0, 1)  # [positions, residual]
            if self.how.loss == "cosine":
                each = 1 - functional.cosine_similarity(own, wanted, dim=-1)
            else:
                square = wanted.square().sum(-1).clamp(min=_LEAST)
                each = (own - wanted).square().sum(-1) / square
            total = total + (each * weight).sum()
        self.student.clear()
        self.teacher.clear()
        return self.how.weight * total / len(self.pairs)


@contextmanager
def watched(
    how: Hidden,
    student: Sequence[torch.nn.Module],
    teacher: Sequence[torch.nn.Module],
    widths: tuple[int, int],
    survived: Sequence[int] | None,
    *,
    seed: int,
    device: str,
) -> Iterator[States]:
    """Watches the blocks of two models, whose states have `widths`, inside a `with`."""
    pairs = paired(how, len(student), len(teacher), survived)
    maps: dict[int, torch.nn.Parameter] = {}
    if widths[0] != widths[1]:
        random = torch.Generator().manual_seed(seed)
        for one, _ in pairs:
            start = torch.randn(widths[1], widths[0], generator=random) * widths[0] ** -0.5
            maps[one] = torch.nn.Parameter(start.to(device))
    states = States(how, pairs, maps)
    with ExitStack() as undo:
        for one, other in pairs:
            for blocks, at, kept in (
                (student, one, states.student), (teacher, other, states.teacher),
            ):  # fmt: skip
                hook = blocks[at].register_forward_hook(partial(_keep, kept, at))
                undo.callback(hook.remove)
        yield states


def _keep(
    kept: dict[int, torch.Tensor], at: int, module: torch.nn.Module, args: Any, out: Any
) -> None:
    del module, args
    kept[at] = out[0] if isinstance(out, tuple) else out
