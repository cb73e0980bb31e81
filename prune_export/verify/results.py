"""The results of verification as plain data: JSON in, JSON out, nothing computed here.

Every class holds JSON types only, so that `verify.json` and the report are these values written
down, raw samples included, and a reader can recompute every figure that is shown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, TypeAdapter

from prune_export.recipe.stages import Workload

Phase = Literal["prefill", "decode"]
Verdict = Literal["faster", "slower", "no speedup"]
T = TypeVar("T")


def _whole(found: Any) -> Any:
    """A recipe may leave a size to its default; what was measured says all of them."""
    if isinstance(found, dict) and not {"batch", "prompt", "new"} <= found.keys():
        raise ValueError("expected `batch`, `prompt` and `new`")
    return found


@dataclass(frozen=True)
class Speed:
    """The speed of the pruned engine against the dense one, on one workload, in one phase.

    The samples are raw, one a round, interleaved pairs: in `prefill` seconds for the whole prompt
    (all sequences of the batch), in `decode` seconds for one decoding step (one new token for
    every sequence). `ratio` is dense / pruned time, above 1 is faster; `low` and `high` are its
    95 % bootstrap interval; `floor_low` and `floor_high` bound what dense against dense (A/A)
    showed on this machine. `bound` is weight bytes dense / pruned: what memory traffic allows in
    decode, 0 where that is not known. Tokens per second count all sequences of the batch.
    `again_seconds` are the samples of a second process of the dense engine, and `rounds` says how
    many of the samples came from each launch: from these every figure can be computed again
    (`compare.compare`).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    engine: str
    workload: Annotated[Workload, BeforeValidator(_whole)]
    phase: Phase
    dense_seconds: list[float]
    pruned_seconds: list[float]
    ratio: float
    low: float
    high: float
    floor_low: float
    floor_high: float
    bound: float
    verdict: Verdict
    dense_tokens_per_second: float
    pruned_tokens_per_second: float
    again_seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Perplexity:
    """Perplexity: exp(mean loss) over non-overlapping windows of `length` tokens.

    `name` is dense, pruned, healed or an engine's name; `losses` holds each window's mean
    cross-entropy in nats over its `length - 1` predicted tokens; `tokens` counts all of these.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    value: float
    windows: int
    length: int
    tokens: int
    losses: list[float]


@dataclass(frozen=True)
class Generation:
    """How many of the greedy continuations of the built-in prompts went wrong, and the texts.

    `distinct` has the share of different ones among all their tokens, pairs and triples of tokens;
    empty where it was measured before there was such a thing.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    prompts: int
    empty: int
    repetitive: int
    broken: int
    examples: list[dict[str, str]]
    distinct: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Parity:
    """How far an engine is from PyTorch of the same checkpoint, on the same tokens.

    `max_logit_error` is absolute; `mean_kl` is KL(PyTorch ‖ engine) in nats; `greedy_equal` of
    `greedy_total` greedy tokens agree. `tolerance` is the largest logit error that is accepted,
    0 where the precision's error is reported but not gated.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    engine: str
    against: str
    max_logit_error: float
    mean_kl: float
    greedy_equal: int
    greedy_total: int
    ok: bool
    tolerance: float


@dataclass(frozen=True)
class Reload:
    """Whether stock transformers, in a fresh process, loaded every tensor and nothing else.

    `own_code` says that it was allowed to run the code of ours that lies beside the checkpoint.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    ok: bool
    model_type: str
    missing: list[str]
    unexpected: list[str]
    parameters: int
    seconds: float
    own_code: bool = False


@dataclass(frozen=True)
class Task:
    """One metric of one lm-eval task, `dense` None where the dense model was not evaluated.

    `engine` is the exporter of the engine that was evaluated; empty: the checkpoint itself.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    metric: str
    dense: float | None
    pruned: float
    samples: int
    engine: str = ""


@dataclass(frozen=True)
class WeightPattern:
    """A weight of an engine's graph: the fraction of zeros, and the pattern, '' for none."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    inputs: int
    outputs: int
    zeros: float
    pattern: str


@dataclass(frozen=True)
class Sparsity:
    """The evidence of sparse weights and sparse kernels in an engine.

    `asked` says that sparse kernels were allowed; `proven` is True where a witness names one that
    runs, False where there is none, None where it cannot be known. `eligible` and `chosen` count
    layers by the builder's own words, None where it said nothing; `tactics` are the names of sparse
    kernels by layer. `gain` is speed against the same engine with sparsity off, `sweep` the same
    over a grid: in these, `dense` means that engine.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    engine: str
    weights: list[WeightPattern]
    asked: bool
    proven: bool | None
    eligible: int | None = None
    chosen: int | None = None
    eligible_layers: list[str] = field(default_factory=list)
    chosen_layers: list[str] = field(default_factory=list)
    tactics: dict[str, str] = field(default_factory=dict)
    note: str = ""
    gain: list[Speed] = field(default_factory=list)
    sweep: list[Speed] = field(default_factory=list)


@dataclass(frozen=True)
class Placed:
    """The execution providers that ran an engine's nodes, and the nodes that strayed.

    `strayed` names nodes that multiply and ran on another provider than the one asked for.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    engine: str
    asked: str
    providers: dict[str, int]
    strayed: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all matrix products ran on the provider asked for."""
        return not self.strayed


@dataclass(frozen=True)
class Gate:
    """A claim of the recipe, what was measured, and whether it holds."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    what: str
    claimed: float
    measured: float
    ok: bool


@dataclass(frozen=True)
class Verification:
    """All measurements of one run, and the machine that they were made on.

    `sweep` is speed over a grid of batches and prompts, each cell with less effort than `speed`.
    `unverified` says of an engine why it was not run, though the recipe asks for checks of it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    reload: Reload
    parity: list[Parity] = field(default_factory=list)
    perplexity: list[Perplexity] = field(default_factory=list)
    generation: list[Generation] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    speed: list[Speed] = field(default_factory=list)
    sweep: list[Speed] = field(default_factory=list)
    sparsity: list[Sparsity] = field(default_factory=list)
    placement: list[Placed] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    unverified: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it reloads, engines agree with PyTorch and run where asked, and gates hold."""
        return (
            self.reload.ok
            and all(parity.ok for parity in self.parity)
            and all(placed.ok for placed in self.placement)
            and all(gate.ok for gate in self.gates)
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Verification:
        return from_json(Verification, data)


def to_json(value: Any) -> Any:
    """Turns a result of this module, or a list of them, into JSON types."""
    return [to_json(item) for item in value] if isinstance(value, list) else asdict(value)


def from_json(kind: type[T], data: Any) -> T:
    """Restores a result (`Speed`, `list[Parity]` …) from `to_json`'s data.

    Raises:
        pydantic.ValidationError: a field is missing, unknown or of another type.
    """
    return TypeAdapter(kind).validate_python(data, strict=False)
