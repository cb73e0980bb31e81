"""Rounds of prune and heal: one entry of `stages`, written out as a stage for each round.

Each round works on the model of the round before, and scores it again. A round's stages are stages
like all others: they are planned, kept in the store and resumed in the same way, and are the same
artifacts as if each had been written out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from prune_export import registry
from prune_export.errors import PlanError, RecipeError
from prune_export.recipe.document import Document, Path_
from prune_export.recipe.stages import Round, Stage

NUMBER: Final = "remove"
FRACTIONS: Final = ("sparsity", "ffn", "heads", "kv_groups", "hidden", "experts")
"""The keys of how much goes: a number, and fractions."""

BY_ROUND: Final[Mapping[str, tuple[str, ...]]] = {
    "prune": (NUMBER, *FRACTIONS),
    "heal": ("steps", "learning_rate", "seed"),
}
"""The keys that may have a list: one value for each round."""

_SEED: Final = "seed"
_DIGITS: Final = 9


@dataclass(frozen=True)
class Iterate:
    """Prune and heal in rounds, each on the model of the round before, which is scored again.

    What is removed is shared among the rounds in equal steps of the dense model: `remove` as whole
    blocks, the larger shares first; a fraction of the structure in each round as the fraction of
    what is left that makes an equal step, rounded as the method rounds; a fraction of zeros growing
    by an equal step, zeros kept. A list has one value for each round, as the method takes it then.
    `steps`, `learning_rate` and `seed` of a heal may be lists too; a seed that is none grows by one
    each round, so that no round begins with the windows of the last.

    Source: Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse", arXiv:2402.11187
    (pruned again after post-training); Muralidharan et al., "Compact Language Models via Pruning
    and Knowledge Distillation", arXiv:2407.14679 (15B to 8B to 4B, better than at once).
    """

    VERSION: ClassVar[str] = "1"

    rounds: Annotated[int, Field(ge=2, le=100, description="How often its stages are done.")]
    stages: Annotated[
        tuple[Mapping[str, Any], ...],
        Field(min_length=1, description="The `prune` and `heal` stages of a round, in order."),
    ]


def written_out(
    body: Iterate, document: Document, path: Path_
) -> Iterator[tuple[int, Path_, dict[str, Any]]]:
    """Writes out the stages of all rounds: the round's number from 1, where it stands, the stage.

    Raises:
        RecipeError: there is nothing to share out, or a list has not one value for each round.
    """
    if not any("prune" in stage for stage in body.stages):
        raise RecipeError(
            document.where(path),
            "has no `prune` among its stages: all rounds would be one",
            "write the stages without `iterate`",
        )
    shared = [
        _shared(stage, body.rounds, document, (*path, "stages", place))
        for place, stage in enumerate(body.stages)
    ]
    for number in range(body.rounds):
        for place, stages in enumerate(shared):
            yield number + 1, (*path, "stages", place), stages[number]


def together(stages: Sequence[tuple[Stage, Mapping[str, Any]]]) -> dict[str, Any]:
    """The `iterate` entry that is written out as these stages, each with its keys as plain data."""
    first = stages[0][0].round
    assert first is not None
    count = len(stages) // first.of
    inner = []
    for place in range(count):
        rounds = [stages[place + count * number] for number in range(first.of)]
        kind = rounds[0][0].kind
        inner.append({kind: _listed(kind, [body for _, body in rounds])})
    return {"iterate": {"rounds": first.of, "stages": inner}}


def _listed(kind: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One stage's keys, with lists where rounds differ, or would be shared out again."""
    found: dict[str, Any] = {}
    for key, value in rounds[0].items():
        values = [one[key] for one in rounds]
        amount = key in BY_ROUND[kind] and (kind == "prune" or key == _SEED)
        listed = value is not None and (amount or any(one != value for one in values))
        found[key] = values if listed else value
    return found


def _shared(
    stage: Mapping[str, Any], rounds: int, document: Document, path: Path_
) -> list[dict[str, Any]]:
    """A stage as each of the rounds has it."""
    if len(stage) != 1:
        return [dict(stage)] * rounds  # refused where it is read
    ((kind, body),) = stage.items()
    if kind not in BY_ROUND or not isinstance(body, dict):
        return [dict(stage)] * rounds
    at = (*path, kind)
    values = {key: body[key] for key in BY_ROUND[kind] if key in body and body[key] is not None}
    if kind == "prune":
        _refuse_amountless(body, values, document, at)
    elif _SEED not in values:
        values[_SEED] = 0
    columns = {
        key: _column(kind, key, value, rounds, body, document, (*at, key))
        for key, value in values.items()
    }
    return [
        {kind: dict(body) | {key: column[number] for key, column in columns.items()}}
        for number in range(rounds)
    ]


def _refuse_amountless(
    body: Mapping[str, Any], values: Mapping[str, Any], document: Document, path: Path_
) -> None:
    """Refuses what is the same in each round, or can be in the first alone."""
    for key, why in (
        ("nm", "is a pattern, which has no steps: the second round would find it there"),
        ("layers", "are numbers of blocks, and after a round others have these"),
        ("target", "is reached in the first round"),
    ):
        if body.get(key) is not None and not (key == "layers" and values.get("sparsity")):
            raise RecipeError(
                document.where((*path, key)),
                f"{why}",
                f"write the stage without `iterate`, or one of {', '.join(BY_ROUND['prune'])}",
            )


def _column(
    kind: str,
    key: str,
    value: Any,
    rounds: int,
    body: Mapping[str, Any],
    document: Document,
    path: Path_,
) -> list[Any]:
    """A key's value in each round."""
    if isinstance(value, list):
        if len(value) != rounds:
            raise RecipeError(
                document.where(path),
                f"lists {len(value)} values for {rounds} rounds",
                "write one for each, or one value that is shared out"
                if kind == "prune"
                else "write one for each, or one value for all",
            )
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [value] * rounds  # refused where it is read
    if kind == "heal":
        return [value + number if key == _SEED else value for number in range(rounds)]
    if key == NUMBER:
        if value < rounds:
            raise RecipeError(
                document.where(path),
                f"got {value} in {rounds} rounds: some would remove nothing",
                f"write at least {rounds}, or fewer rounds",
            )
        least, more = divmod(int(value), rounds)
        return [least + (number < more) for number in range(rounds)]
    if not 0 < value < 1:
        return [value] * rounds  # refused where it is read
    return [round(share, _DIGITS) for share in _fractions(float(value), rounds, body)]


def _fractions(whole: float, rounds: int, body: Mapping[str, Any]) -> list[float]:
    """The fraction that a method is given in each round, so that all are equal steps in `whole`."""
    step = whole / rounds
    if _grows(body):
        return [step * (number + 1) for number in range(rounds)]
    if body.get("unit", "block") != "block":
        return [step] * rounds  # the shapes stay, and each round zeroes more
    return [step / (1 - step * number) for number in range(rounds)]


def _grows(body: Mapping[str, Any]) -> bool:
    """Whether a fraction counts the zeros that were there before, as these stay and are found."""
    if body.get("per_layer"):
        return True
    try:
        entry: Any = registry.find("methods", str(body.get("method")))
    except PlanError:
        return False  # refused where it is read
    return any(field.name == "nm" for field in dataclasses.fields(entry))


def rounded(stage: Stage, number: int, body: Iterate, group: int) -> Stage:
    """The stage as one of a round."""
    return dataclasses.replace(stage, round=Round(number, body.rounds, group))
