"""Chooses blocks by a score: all at once, rescored after each removal, or confirmed by the loss.

The same goes for their attention or their MLP alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import exp
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView, Part, Unit, native_dtype
from prune_export.errors import PlanError
from prune_export.pruning.depth import block_choice
from prune_export.pruning.depth.greedy import greedy

Select = Annotated[
    Literal["one_shot", "iterative", "greedy"],
    Field(
        description="How blocks are chosen. `one_shot`: those with the least scores. `iterative`: "
        "the least one, and again in the model without it. `greedy`: the score says which blocks "
        "are tried first, the measured loss decides (see `greedy_loss`)."
    ),
]

Scores = Callable[[ModelView], Sequence[float]]
"""Every block's score in a model, or that of a part of every block."""

_WINDOWS: Final = (8, 256)
"""Windows and tokens on which losses are measured, and how many blocks are tried a removal."""
_SHORTLIST: Final = 8


def passes(
    select: Select, arch: Arch, remove: int, each: float, *, ram_bytes: int = 0
) -> tuple[ExtraPass, ...]:
    """The extra passes of a choice that is not made at once; `each` is one scoring's."""
    samples, length = _WINDOWS
    if select == "iterative":
        return (ExtraPass(forwards=each * remove, ram_bytes=ram_bytes),)
    head = 8 * arch.sizes["vocab"] * arch.sizes["residual"]
    return (
        ExtraPass(forwards=each, ram_bytes=ram_bytes),
        ExtraPass(
            forwards=_SHORTLIST * remove / 2,
            samples=samples,
            length=length,
            ram_bytes=head,
            handy_bytes=4 * arch.parameters(),
        ),
    )


def refuse_run(select: Select, contiguous: bool) -> None:
    """Refuses `contiguous` together with a choice one by one.

    Raises:
        PlanError: it is.
    """
    if contiguous and select != "one_shot":
        raise PlanError(
            "select",
            f"got `{select}` with `contiguous`",
            "write `select: one_shot`, or leave one out",
        )


def iterative(
    model: ModelView, remove: int, allowed: Collection[int], scores: Scores, part: Part = "block"
) -> block_choice.Choice:
    """Removes the block (or part of one) with the least score, rescores, and repeats.

    Each step is logged. Blocks are numbered as in `model`; only those in `allowed` go.
    """
    order: list[int] = []
    steps: list[dict[str, Any]] = []
    for _ in range(remove):
        if part == "block":
            left = model.arch.kept(order) if order else tuple(range(model.arch.layers))
            found = dict(zip(left, scores(model.without(order)), strict=True))
        else:
            ablated = model.ablated([Unit(layer, part) for layer in order])
            found = dict(enumerate(scores(ablated)))
        ranked = sorted(
            (score, -layer)
            for layer, score in found.items()
            if layer in allowed and layer not in order
        )
        score, layer = ranked[0][0], -ranked[0][1]
        step: dict[str, Any] = {"removed": layer, "score": score}
        if len(ranked) > 1:
            step |= {"runner_up": -ranked[1][1], "margin": ranked[1][0] - score}
        order.append(layer)
        steps.append(step)
    return block_choice.Choice(tuple(order), {"order": order, "steps": steps})


def guided(
    model: ModelView,
    remove: int,
    allowed: Collection[int],
    scores: Sequence[float],
    part: Part = "block",
) -> block_choice.Choice:
    """Removes what the measured loss is least without, trying low scores first."""
    samples, length = _WINDOWS
    guess = {Unit(layer, part): scores[layer] for layer in allowed}
    dtype = native_dtype(model.calibration().machine)
    with model.ablations(samples, length, dtype) as ablations:
        found = greedy(
            ablations, list(guess), remove, shortlist=_SHORTLIST, revise=False, guess=guess
        )
    return block_choice.Choice(
        tuple(unit.layer for unit in found.order),
        {
            "order": [unit.layer for unit in found.order],
            "steps": [dict(step) for step in found.steps],
            "perplexity": exp(found.best[-1][0]),
        },
    )
