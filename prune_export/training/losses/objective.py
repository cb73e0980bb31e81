"""What a model is trained for: the next token, or to say what a teacher says."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from prune_export.recipe.sources import Frozen
from prune_export.training.losses.divergence import Divergence

NEXT_TOKEN: Final = "next_token"

Cache = Literal["auto", "live"] | Annotated[int, Field(ge=1)]


class Hidden(Frozen):
    """Hidden states of the student are brought to its teacher's too, block by block."""

    weight: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="What it is multiplied by and added with."),
    ] = 1.0
    by: Annotated[
        Literal["surviving", "last_2"],
        Field(
            description="Which states are compared. `surviving`: what leaves each block of the "
            "student with what leaves the same block of the model that the recipe starts from. "
            "`last_2`: what leaves the last block but one of each."
        ),
    ] = "surviving"
    loss: Annotated[
        Literal["mse", "cosine"],
        Field(
            description="`mse`: the squared distance of a token's states over the teacher's square."
            " `cosine`: 1 less the cosine of the angle between them."
        ),
    ] = "mse"


_BETA: Final = 0.5
_NEW_TOKENS: Final = 128
_SAMPLING_TEMPERATURE: Final = 0.9


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
    ] = _BETA
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
    # Keys of later versions are left out where they have their defaults: as in `Training`.
    on_policy: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the steps in which the student learns from what it says itself: "
            "it goes on with the windows' beginnings, and its teacher judges each token.",
            exclude_if=lambda value: value == 0,
        ),
    ] = 0.0
    new_tokens: Annotated[
        int,
        Field(
            gt=0,
            description="Of `on_policy`: tokens that the student says, at most; they take the "
            "place of a window's last ones.",
            exclude_if=lambda value: value == _NEW_TOKENS,
        ),
    ] = _NEW_TOKENS
    sampling_temperature: Annotated[
        float,
        Field(
            ge=0,
            le=10,
            description="Of `on_policy`: that of the drawing alone; the loss has `temperature`.",
            exclude_if=lambda value: value == _SAMPLING_TEMPERATURE,
        ),
    ] = _SAMPLING_TEMPERATURE
    hidden: Annotated[
        Hidden | None,
        Field(
            description="Compare hidden states too; null does not.",
            exclude_if=lambda value: value is None,
        ),
    ] = None

    def model_post_init(self, context: Any) -> None:
        del context
        if self.beta != _BETA and self.divergence != "jsd":
            raise ValueError(
                f"`beta: {self.beta:g}` is of `divergence: jsd`, and the divergence is "
                f"`{self.divergence}`: write `divergence: jsd`, or leave `beta` out"
            )
        for key, value, default in (
            ("new_tokens", self.new_tokens, _NEW_TOKENS),
            ("sampling_temperature", self.sampling_temperature, _SAMPLING_TEMPERATURE),
        ):
            if value != default and not self.on_policy:
                raise ValueError(
                    f"`{key}: {value:g}` is of `on_policy`, which is 0: write a share of the steps "
                    f"to it, or leave `{key}` out"
                )
        if isinstance(self.cache, int) and self.on_policy:
            raise ValueError(
                f"`cache: {self.cache}` keeps what the teacher says to the data, and `on_policy` "
                "asks it about what the student says: write `cache: live`"
            )
        if isinstance(self.cache, int) and self.hidden:
            raise ValueError(
                f"`cache: {self.cache}` keeps no hidden states, which `hidden` compares: write "
                "`cache: live`"
            )
        if self.hidden and self.hidden.by == "surviving" and self.teacher:
            raise ValueError(
                "blocks survive of the model that the recipe starts from, and another `teacher` is "
                "named: write `hidden: {by: last_2}`"
            )

    @property
    def needs_live(self) -> bool:
        """Whether the teacher has to run beside the student."""
        return bool(self.on_policy) or self.hidden is not None


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
