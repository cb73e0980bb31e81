"""What a model is trained for: the next token, or to say what a teacher says."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from prune_export.recipe.sources import Frozen
from prune_export.training.divergence import Divergence

NEXT_TOKEN: Final = "next_token"

Cache = Literal["auto", "live"] | Annotated[int, Field(ge=1)]


class Distill(Frozen):
    """White-box distillation: the student's next-token distribution is brought to its teacher's."""

    divergence: Annotated[
        Divergence,
        Field(
            description="`forward_kl` covers all that the teacher says, `reverse_kl` says nothing "
            "that it would not, `jsd` is between them."
        ),
    ] = "forward_kl"
    beta: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Of `jsd`: the weight of the teacher in the mean distribution; 0 is "
            "`forward_kl` and 1 `reverse_kl`.",
        ),
    ] = 0.5
    temperature: Annotated[
        float,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Both distributions are softened by it; the loss is multiplied by its "
            "square.",
        ),
    ] = 1.0
    cross_entropy: Annotated[
        float,
        Field(ge=0, le=1, description="Share of the next-token loss; the rest is the divergence."),
    ] = 0.0
    teacher: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Directory below the data root, or Hub id, of a model with the same "
            "vocabulary; null is the model that the recipe starts from.",
        ),
    ] = None
    cache: Annotated[
        Cache,
        Field(
            description="`live` runs the teacher beside the student. A number computes its answers "
            "once, one block in memory, and keeps so many of the likeliest tokens, and what all "
            "others have together. `auto` takes what costs less, 128 tokens if it keeps any."
        ),
    ] = "auto"


class Distilled(Frozen):
    """An objective with its keys."""

    distill: Annotated[Distill, Field(description="The keys of `distill`.")] = Distill()


def _written_out(value: Any) -> Any:
    """`distill` alone stands for all of its defaults, and so does the key without a value."""
    if value == "distill":
        return {"distill": {}}
    if isinstance(value, dict) and "distill" in value and value["distill"] is None:
        return value | {"distill": {}}
    return value


def _kind(value: Any) -> str:
    return "name" if isinstance(value, str) else "keys"


Objective = Annotated[
    Annotated[Literal["next_token", "distill"], Tag("name")] | Annotated[Distilled, Tag("keys")],
    Discriminator(_kind),
    BeforeValidator(
        _written_out, json_schema_input_type=Literal["next_token", "distill"] | Distilled
    ),
]
"""As a recipe writes it: `next_token`, `distill`, or `{distill: {keys: values}}`."""


def distill_of(objective: str | Distilled) -> Distill | None:
    """How it distils; None where it does not."""
    if isinstance(objective, Distilled):
        return objective.distill
    return None if objective == NEXT_TOKEN else Distill()
