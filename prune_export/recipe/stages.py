"""A recipe's stages and workloads as values, apart from how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from prune_export.recipe.sources import Frozen

_MOST_REQUESTS: Final = 1000

StageKind = Literal["prune", "quantize", "heal", "search"]


@dataclass(frozen=True)
class Workload:
    """A workload to time: `prompt` tokens in, `new` tokens out, for `batch` sequences."""

    # What a recipe asks for and what a measurement says that it was made on are this one value.
    __pydantic_config__ = ConfigDict(extra="forbid")

    batch: Annotated[int, Field(ge=1, description="Sequences at once.")] = 1
    prompt: Annotated[int, Field(ge=1, description="Prompt tokens.")] = 512
    new: Annotated[int, Field(ge=1, description="New tokens.")] = 128


class Sweep(Frozen):
    """A grid of workloads over which speed is measured."""

    batch: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, description="Batch sizes.")
    ] = (1,)
    prompt: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...],
        Field(min_length=1, description="Prompt lengths, in tokens."),
    ] = (1, 16, 64, 256, 1024)
    new: Annotated[int, Field(ge=1, description="New tokens after each prompt.")] = 4
    minutes: Annotated[
        float, Field(gt=0, description="Time limit for each engine's grid, in minutes.")
    ] = 10.0

    def model_post_init(self, context: Any) -> None:
        del context
        count = len(self.batch) * len(self.prompt)
        if count > _MOST_REQUESTS:
            raise ValueError(f"makes {count:,} requests, expected at most {_MOST_REQUESTS:,}")

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Lists the workloads: every batch with every prompt."""
        return tuple(
            Workload(batch=batch, prompt=prompt, new=self.new)
            for batch in self.batch
            for prompt in self.prompt
        )


@dataclass(frozen=True)
class Round:
    """Which round of an `iterate` a stage belongs to, from 1; `group` tells two of them apart."""

    number: int
    of: int
    group: int = 0

    def __str__(self) -> str:
        """As plans, logs and reports name it."""
        return f"round {self.number} of {self.of}"


@dataclass(frozen=True)
class Stage:
    """One stage: a registered entry with its parameters, and the name of its data."""

    kind: StageKind
    name: str
    entry: Any
    data: str
    round: Round | None = None

    @property
    def title(self) -> str:
        """Its name, and the round that it belongs to, if it does."""
        return f"{self.name}, {self.round}" if self.round else self.name

    def parameters(self) -> dict[str, Any]:
        """The entry's fields as plain data, defaults included."""
        return plain(self.entry)

    @property
    def uses(self) -> tuple[str, ...]:
        """The names of all `data` sources that it may read."""
        if self.kind != "search":
            return (self.data,)
        named: tuple[str, ...] = self.entry.uses
        return named


def plain(entry: Any) -> dict[str, Any]:
    """Turns the fields of a dataclass into JSON types.

    Keys that came later (`LATER`, with what they are in recipes without them) are left out where
    they are as before: what depends on the keys keeps its id.
    """
    cls: Any = type(entry)
    dumped: dict[str, Any] = checker(cls).dump_python(entry, mode="json")
    later = getattr(cls, "LATER", {})
    return {key: value for key, value in dumped.items() if key not in later or value != later[key]}


@lru_cache(maxsize=256)
def checker(cls: Any) -> TypeAdapter[Any]:
    """Makes the pydantic validator of a class; cached, as making one takes longer than using it."""
    return TypeAdapter(cls)
