"""The `search` stage: candidates of one size or speed, of which the best measured one is taken.

A candidate is a list of prune stages, in one value of which stands `to_target`: that value is found
from the model's shapes, so that each candidate comes to the same size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from prune_export import registry
from prune_export.arch import Arch
from prune_export.errors import PlanError
from prune_export.recipe.grid import TO_TARGET, Grid, labelled
from prune_export.recipe.sources import Frozen
from prune_export.recipe.stages import Stage, Workload, checker
from prune_export.units import bytes_from_text

_STEPS: Final = 24

MOST: Final = 1000
"""Candidates that a search may have; the shapes of each are worked out in the plan."""


class Target(Frozen):
    """The size or speed that every candidate is brought to; exactly one of the first four keys.

    A latency is turned into a speedup by timing the dense engine.
    """

    parameters: Annotated[
        float | None, Field(gt=0, lt=1, description="Fraction of the parameters that is left.")
    ] = None
    bytes: Annotated[
        str | None, Field(description="Size of the weights, as the base stores them: `200MB`.")
    ] = None
    speedup: Annotated[
        float | None,
        Field(gt=1, description="Decoding speed of `engine` over the dense engine, as measured."),
    ] = None
    latency_ms: Annotated[
        float | None,
        Field(gt=0, description="Milliseconds that a decoding step of `engine` takes, measured."),
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
        given = [self.parameters, self.bytes, self.speedup, self.latency_ms]
        if sum(one is not None for one in given) != 1:
            raise ValueError(
                "expected exactly one of `parameters`, `bytes`, `speedup` and `latency_ms`"
            )
        if self.bytes is not None:
            bytes_from_text(self.bytes)

    @property
    def timed(self) -> bool:
        """Whether candidates are brought to a speed, not to a size."""
        return self.speedup is not None or self.latency_ms is not None

    def fraction(self, nbytes: int) -> float | None:
        """The fraction of parameters to keep of a base with `nbytes` of weights.

        None where that depends on speed.

        Raises:
            PlanError: the base is already smaller.
        """
        if self.bytes is None:
            return self.parameters
        left = bytes_from_text(self.bytes) / nbytes
        if left >= 1:
            raise PlanError(
                "search  target.bytes",
                f"got {self.bytes}, but the base has {nbytes:,} bytes of weights",
                "ask for less",
            )
        return left


@dataclass(frozen=True)
class Search:
    """Bring several candidates to one size or speed, and go on with the best by validation loss.

    Candidates are healed in rungs, each as long as all before it; after each the better half goes
    on, and of the others those that are too close to tell. The short heal is only for ranking.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation",
    arXiv:2407.14679, section 3: candidates near one size, lightly retrained before they are ranked,
    as zero-shot ranks mislead across axes. Jamieson and Talwalkar, "Non-stochastic Best Arm
    Identification and Hyperparameter Optimization", arXiv:1502.07943: successive halving.
    Differs: any registered methods may compete; sizes are solved for, or a grid of them is kept
    where it is near the target; losers that are clear are not healed on.
    """

    VERSION: ClassVar[str] = "2"

    target: Annotated[Target, Field(description="What every candidate is brought to.")]
    validation: Annotated[str, Field(description="Name of the `data` source that ranks.")]
    candidates: Annotated[
        tuple[tuple[Mapping[str, Any], ...], ...],
        Field(description="Lists of prune stages; one value of each list is `to_target`."),
    ] = ()
    grid: Annotated[
        Grid | None, Field(description="Further candidates: every combination of these sizes.")
    ] = None
    engines: Annotated[
        tuple[Mapping[str, Any], ...],
        Field(
            description="Engines to choose among, as in `export`, the first one to compare with: "
            "the dense model on each, and pruned ones where that falls short, compete by quality. "
            "`quantize` beside the exporter is a stage before it. Empty leaves the precision alone."
        ),
    ] = ()
    alternative: Annotated[
        bool,
        Field(
            description="With `engines`: prune also where the dense model on one of them reaches "
            "the target at the quality of the first, to say what pruning would have given."
        ),
    ] = True
    heal: Annotated[
        Mapping[str, Any] | None,
        Field(description="A short heal before ranking, as in a `heal` stage; not carried on."),
    ] = None
    rungs: Annotated[
        int, Field(ge=1, le=6, description="Parts in which it is healed; losers drop out between.")
    ] = 3
    give_up: Annotated[
        float,
        Field(
            gt=0,
            description="Nats of validation loss above the best pruned one at which a candidate "
            "is not healed.",
        ),
    ] = 1.0
    close: Annotated[
        float,
        Field(
            ge=0,
            description="Nats of validation loss above the best at which a candidate of the worse "
            "half is still healed on.",
        ),
    ] = 0.02
    measure_speed: Annotated[
        bool,
        Field(
            description="Also time the engine of each candidate that was ranked: the report then "
            "shows quality over speed."
        ),
    ] = False
    executor: Annotated[
        Literal["local", "ray"],
        Field(description="Where candidates are made: processes here, or on a Ray cluster."),
    ] = "local"
    workers: Annotated[
        int, Field(ge=1, description="Candidates made at once; memory and threads are shared out.")
    ] = 1

    def __post_init__(self) -> None:
        """Refuses too many candidates, before any of them is made.

        Raises:
            PlanError: there are too many.
        """
        sizes = self.grid.sizes if self.grid else ()
        count = len(self.candidates) + (prod(sizes) if self.grid else 0)
        if count <= MOST:
            return
        spelt = f" ({' x '.join(map(str, sizes))})" if len(sizes) > 1 else ""
        raise PlanError(
            "grid" if sizes else "candidates",
            f"makes {count:,} candidates{spelt}, expected at most {MOST:,}",
            "write fewer amounts, or `to_target` for one list: it is then solved for"
            if sizes
            else "write fewer, or a `grid`",
        )

    def items(self) -> tuple[tuple[Mapping[str, Any], ...], ...]:
        """Yields the prune stages of each candidate."""
        listed = tuple(tuple(item["prune"] for item in one) for one in self.candidates)
        return listed + (self.grid.items() if self.grid else ())

    @property
    def uses(self) -> tuple[str, ...]:
        """The names of all `data` sources that it may read."""
        healing = (self.heal or {}).get("data", "healing") if self.heal else None
        named = [body.get("data", "calibration") for one in self.items() for body in one]
        coarse = [one["quantize"] for one in self.engines if one.get("quantize")]
        named += [body.get("data", "calibration") for body in coarse]
        return tuple(dict.fromkeys(filter(None, (self.validation, healing, *named))))


@dataclass(frozen=True)
class Candidate:
    """A resolved candidate: its stages, the shapes after them, and its label."""

    stages: tuple[Stage, ...]
    arch: Arch
    value: float
    label: str


@dataclass(frozen=True)
class Template:
    """A candidate as written in the recipe, perhaps with a value to find."""

    items: tuple[tuple[str, Mapping[str, Any], str], ...] = field(default_factory=tuple)
    """(method, keys, name of the data) of each stage."""
    of_grid: bool = False

    @property
    def label(self) -> str:
        """The methods, in order, with the amounts that are given."""
        return " + ".join(labelled(name, body) for name, body, _ in self.items)

    @property
    def fixed(self) -> bool:
        """Whether there is no value to find."""
        return not any(marks(body) for _, body, _ in self.items)

    def resolved(self, value: float, arch: Arch) -> Candidate:
        """Makes the candidate with `value` in the place of `to_target`.

        Raises:
            PlanError: the methods cannot work on this model with it.
        """
        stages = []
        for name, body, data in self.items:
            cls = registry.find("methods", name)
            entry = checker(cls).validate_python(_filled(body, value))
            stages.append(Stage("prune", name, entry, data))
            arch = entry.predict(arch)
        label = self.label
        if self.of_grid:
            filled = ((name, _filled(body, round(value, 3))) for name, body, _ in self.items)
            label = " + ".join(labelled(name, body) for name, body in filled)
        return Candidate(tuple(stages), arch, value, label)

    def to_size(self, arch: Arch, parameters: int) -> Candidate:
        """Finds the candidate whose number of parameters is nearest to `parameters`.

        Raises:
            PlanError: the methods cannot work on this model with any value.
        """
        if self.fixed:
            return self.resolved(0.0, arch)
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
        if all(one.arch.parameters() == arch.parameters() for one in found):
            raise PlanError(
                self.label,
                "leaves every shape as it is, with zeros that engines may leave out, so that no "
                "amount brings it to a size or a speed",
                "leave it out of the search, or let it remove whole blocks or uniform widths",
            )
        return min(found, key=lambda one: abs(one.arch.parameters() - parameters))

    def near(self, arch: Arch, left: float, tolerance: float) -> Candidate:
        """Finds the candidate that keeps the fraction `left` of the parameters.

        Raises:
            PlanError: the nearest one is farther from it than `tolerance`.
        """
        wanted = left * arch.parameters()
        self._refuse_outside(arch, wanted * (1 - tolerance), wanted * (1 + tolerance))
        candidate = self.to_size(arch, round(wanted))
        off = candidate.arch.parameters() / wanted - 1
        if abs(off) > tolerance:
            raise PlanError(candidate.label, f"comes only within {off:+.1%} of the target")
        return candidate

    def _refuse_outside(self, arch: Arch, least: float, most: float) -> None:
        """Refuses a grid's template early, when its smallest and its largest cut both miss.

        Most of a grid are such; why one is refused is not told, so that it need not be known well.
        """
        if self.fixed or not self.of_grid or most == inf:
            return
        end = 2.0**-_STEPS
        for value in (end, 1 - end):
            try:
                parameters = self.resolved(value, arch).arch.parameters()
            except PlanError:
                continue
            if parameters < least if value == end else parameters > most:
                raise PlanError(self.label, "cannot come to the target with any amount")

    def why_not(self, error: PlanError) -> str:
        """Says why there is no such candidate, to stand after the label."""
        at_fault = "" if error.where == self.label else f"{error.where}: "
        return f"{at_fault}{error.problem}"


def unreached(told: Sequence[str], outside: int, arch: Arch) -> tuple[str, str]:
    """Words the error where no candidate reaches the target; `told` has each one's reason."""
    parts = [*told, f"{outside} combinations of the grid do not"] if outside else told
    problem = f"no candidate reaches the target: {'; '.join(parts)}{outside_of_blocks(arch)}"
    other = "other amounts, `to_target` for one of them" if outside else "other candidates"
    return problem, f"choose another target, a wider `tolerance`, or {other}"


def outside_of_blocks(arch: Arch) -> str:
    """Hints at it where much of a model is in its embedding and head, which few methods cut."""
    share = 1 - arch.block_parameters() / arch.parameters()
    return (
        f". {share:.0%} of the parameters are outside of the blocks, where only `hidden` cuts"
        if share > 0.4
        else ""
    )


def templates(search: Search) -> Iterator[Template]:
    """Lists the candidates as written, then those of the grid."""
    for number, candidate in enumerate(search.items()):
        items = []
        for written in candidate:
            body = dict(written)
            name, data = str(body.pop("method")), str(body.pop("data", "calibration"))
            items.append((name, body, data))
        yield Template(tuple(items), of_grid=number >= len(search.candidates))


def rungs_of(healer: Stage, rungs: int) -> Iterator[Stage]:
    """Splits a heal into rungs; each goes on from the last, and is as long as all before it."""
    steps = getattr(healer.entry, "steps", None)
    if not isinstance(steps, int):
        yield healer
        return
    ends = sorted({max(1, steps >> back) for back in range(rungs)})
    for start, end in zip([0, *ends], ends, strict=False):
        yield replace(healer, entry=replace(healer.entry, steps=end - start))


def heal_of(search: Search) -> Stage | None:
    """The short heal before ranking."""
    if search.heal is None:
        return None
    body = dict(search.heal)
    name, data = str(body.pop("method")), str(body.pop("data", "healing"))
    entry = checker(registry.find("heal", name)).validate_python(body)
    return Stage("heal", name, entry, data)


def marks(body: Any) -> int:
    """Counts the values that are `to_target`."""
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
