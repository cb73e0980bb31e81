"""The `search` stage: several ways to one size or speed, of which the best measured one is taken.

A candidate is a list of prune stages, in one value of which stands `to_target`: that value is found
from the model's shapes, so that each candidate comes to the same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field, TypeAdapter

from prune_export import registry
from prune_export.arch import Arch
from prune_export.errors import PlanError
from prune_export.recipe.sources import Frozen
from prune_export.recipe.stages import Stage, Workload

TO_TARGET: Final = "to_target"
_STEPS: Final = 24


class Target(Frozen):
    """What every candidate is brought to; exactly one of `parameters` and `speedup`."""

    parameters: Annotated[
        float | None, Field(gt=0, lt=1, description="Fraction of the parameters that is left.")
    ] = None
    speedup: Annotated[
        float | None,
        Field(gt=1, description="Decoding speed of `engine` over the dense engine, as measured."),
    ] = None
    engine: Annotated[str, Field(description="The exporter whose engine is timed.")] = "onnx"
    workload: Annotated[Workload, Field(description="The request that is timed.")] = Workload(
        batch=1, prompt=128, new=32
    )
    tolerance: Annotated[
        float,
        Field(gt=0, lt=0.5, description="How far a candidate may be from the target, relative."),
    ] = 0.05

    def model_post_init(self, context: Any) -> None:
        del context
        if (self.parameters is None) == (self.speedup is None):
            raise ValueError("expected exactly one of `parameters` and `speedup`")


@dataclass(frozen=True)
class Search:
    """Bring several candidates to one size or speed, and go on with the best by validation loss.

    Source: Minitron, arXiv:2407.14679, section 3 ("light NAS"): candidates near one size, lightly
    retrained before they are ranked, as zero-shot ranks mislead across axes.
    Differs: any registered methods may compete; sizes are solved for, not gridded; losers that are
    clear before healing are not healed.
    """

    VERSION: ClassVar[str] = "1"

    target: Annotated[Target, Field(description="What every candidate is brought to.")]
    candidates: Annotated[
        tuple[tuple[Mapping[str, Any], ...], ...],
        Field(
            min_length=1,
            description="Lists of prune stages; one value of each list is `to_target`.",
        ),
    ]
    validation: Annotated[str, Field(description="Name of the `data` source that ranks.")]
    heal: Annotated[
        Mapping[str, Any] | None,
        Field(description="A short heal before ranking, as in a `heal` stage; not carried on."),
    ] = None
    give_up: Annotated[
        float,
        Field(
            gt=0,
            description="Nats of validation loss above the best pruned one at which a candidate "
            "is not healed.",
        ),
    ] = 1.0


@dataclass(frozen=True)
class Candidate:
    """One candidate, resolved: its stages, the shapes that they leave, and what it is called."""

    stages: tuple[Stage, ...]
    arch: Arch
    value: float

    @property
    def label(self) -> str:
        """The methods, in order."""
        return " + ".join(stage.name for stage in self.stages)


@dataclass(frozen=True)
class Template:
    """A candidate as it is written."""

    items: tuple[tuple[str, Mapping[str, Any], str], ...] = field(default_factory=tuple)
    """(method, keys, name of the data) of each stage."""

    def resolved(self, value: float, arch: Arch) -> Candidate:
        """The candidate with `value` in the place of `to_target`.

        Raises:
            PlanError: the methods cannot work on this model with it.
        """
        stages = []
        for name, body, data in self.items:
            cls = registry.find("methods", name)
            entry = TypeAdapter(cls).validate_python(_filled(body, value))
            stages.append(Stage("prune", name, entry, data))
            arch = entry.predict(arch)
        return Candidate(tuple(stages), arch, value)

    def to_size(self, arch: Arch, parameters: int) -> Candidate:
        """The candidate whose number of parameters is nearest to `parameters`.

        Raises:
            PlanError: the methods cannot work on this model with any value.
        """
        low, high = 0.0, 1.0
        found: list[Candidate] = []
        refusal: PlanError | None = None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            try:
                made = self.resolved(middle, arch)
            except PlanError as error:
                # Too much for the method: the value lies below, if anywhere.
                refusal, high = error, middle
                continue
            found.append(made)
            if made.arch.parameters() <= parameters:
                high = middle
            else:
                low = middle
        if not found:
            assert refusal is not None
            raise refusal
        return min(found, key=lambda one: abs(one.arch.parameters() - parameters))


def templates(search: Search) -> Iterator[Template]:
    """The candidates as they are written."""
    for candidate in search.candidates:
        items = []
        for item in candidate:
            body = dict(item["prune"])
            name, data = str(body.pop("method")), str(body.pop("data", "calibration"))
            items.append((name, body, data))
        yield Template(tuple(items))


def heal_of(search: Search) -> Stage | None:
    """The short heal before ranking."""
    if search.heal is None:
        return None
    body = dict(search.heal)
    name, data = str(body.pop("method")), str(body.pop("data", "healing"))
    entry = TypeAdapter(registry.find("heal", name)).validate_python(body)
    return Stage("heal", name, entry, data)


def marks(body: Any) -> int:
    """How many values are `to_target`."""
    if isinstance(body, Mapping):
        return sum(marks(value) for value in body.values())
    if isinstance(body, Sequence) and not isinstance(body, str):
        return sum(marks(value) for value in body)
    return int(body == TO_TARGET)


def _filled(body: Any, value: float) -> Any:
    if isinstance(body, Mapping):
        return {key: _filled(one, value) for key, one in body.items()}
    if isinstance(body, list | tuple):
        return [_filled(one, value) for one in body]
    return value if body == TO_TARGET else body
