"""The interfaces of methods, healers, exporters and runners: all that a plug-in implements.

Each is a frozen dataclass in one file; its fields are its keys in the recipe, its docstring is its
help, and `VERSION` is raised whenever the same input would give other bytes. `docs/your-own.md`
shows one of each but the healer, and `plugins` has all of it in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, Self, TypedDict, runtime_checkable

import numpy as np

from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.system.processes import ALONE, Team

if TYPE_CHECKING:  # the process that times an engine imports this file, and needs no torch
    from prune_export.ablated import Ablated
    from prune_export.arch import Arch
    from prune_export.calibrate import ExtraPass, ModelView, Statistic, TokenSet
    from prune_export.grids import Grid
    from prune_export.surgery import Edit


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a piece of work: peak memory, disk, FLOPs; `plan` adds costs up.

    `flops` (multiplications and additions) and `moved_bytes` (disk reads and writes) are turned
    into seconds with this machine's measured rates; `seconds` is time that neither explains, such
    as tracing a graph. `bfloat16_flops` are those of `flops` that are in bfloat16, which some CPUs
    multiply several times as fast as float32.
    """

    ram_bytes: int = 0
    gpu_bytes: int = 0
    disk_bytes: int = 0
    flops: float = 0.0
    moved_bytes: int = 0
    seconds: float = 0.0
    bfloat16_flops: float = 0.0


@dataclass(frozen=True)
class Teacher:
    """The model that a healer learns from; `id` is made of its files' hashes.

    `answers(tokens, temperature)` is the directory that holds its distributions over the healing
    data: the `tokens` likeliest of each position (`calibrate.KeptAnswers`). If it is not there yet,
    it is made, with one block of the teacher in memory. `blocks` has the teacher's block
    that each of the student's was; None where that is not known.
    """

    path: Path
    id: str
    answers: Callable[[int, float], Path]
    blocks: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Work:
    """What a running stage is given: scratch directory, machine, progress, calibration data.

    `scratch` is a directory that outlives a killed run: long work keeps its checkpoints there and
    goes on from them. It is removed when the stage is complete. `tokens` is calibration data, for
    exporters that ask for it and where the recipe has it; `teacher` is there for healers that are
    `Taught`. `team` are the processes that torchrun started with this one, which share the work.
    """

    machine: Machine
    progress: Progress
    scratch: Path
    tokens: TokenSet | None = None
    teacher: Teacher | None = None
    team: Team = ALONE


class RefitLog(TypedDict, total=False):
    """What a depth method says of the projections that it refitted at the seams of its cut."""

    taken: bool
    why: str
    seams: list[dict[str, Any]]
    held_out_loss: list[float] | None


class StageLog(TypedDict, total=False):
    """The keys of a stage's log that a report reads; others may stand beside them.

    `dropped` and `kept` are blocks, for depth methods; `distance_map` is (L+1) x (L+1), None where
    undefined; `block_scores` one number a block, and `block_score_name` says of what. Who makes
    zeros gives `mask_digest`, `zeros`, `weights` and `pattern`. `loss` is of healing: [step, loss,
    learning rate] of each logged step. `notes` are sentences that the report repeats,
    `grid` says which one a quantizer puts weights on.
    """

    dropped: list[int] | None
    kept: list[int] | None
    distance_map: list[list[float | None]] | None
    block_scores: list[float | None] | None
    block_score_name: str | None
    refit: RefitLog | None
    mask_digest: str
    zeros: int
    weights: int
    pattern: str
    loss: list[list[Any]] | None
    notes: list[str] | None
    grid: str | None


@dataclass(frozen=True)
class Decision:
    """The result of a method: edits, a JSON log of why (`StageLog`), and grids of what is on one.

    `grids` gives a function for each matrix that is put on a quantization grid, which reads it.
    """

    edits: Iterable[Edit]
    log: Mapping[str, Any] = field(default_factory=dict)
    grids: Mapping[str, Callable[[], Grid]] = field(default_factory=dict)


class Method(Protocol):
    """A pruning method: decides what to cut, and returns edits; `surgery` applies them."""

    VERSION: ClassVar[str]

    def statistics(self, arch: Arch) -> tuple[Statistic | ExtraPass, ...]:
        """The calibration statistics that `decide` will read; empty when it needs no data.

        Passes that `decide` runs itself, because they depend on what it finds, are announced as
        `ExtraPass`.
        """

    def predict(self, arch: Arch) -> Arch:
        """The shapes after the cut, without weights or data.

        Where blocks are not alike and data decides which go, it is those of a likely choice.

        Raises:
            PlanError: the parameters cannot work on this model.
        """

    def decide(self, model: ModelView) -> Decision:
        """Decides what to cut, from the statistics and, where it reads them, the weights."""


@runtime_checkable
class HasPlanNote(Protocol):
    """A method that adds a note to the plan."""

    def note(self, arch: Arch) -> str:
        """What a reader of the plan must know, in a few words; may be empty."""


@runtime_checkable
class Refitting(Protocol):
    """A method that also refits weights if its stage has calibration data."""

    @property
    def needs_data(self) -> bool:
        """Whether the stage is refused without data."""

    def passes_with_data(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The calibration passes of the refit, beyond those in `statistics`.

        Raises:
            PlanError: the parameters cannot work on this model.
        """

    def refit_note(self, arch: Arch) -> str:
        """What a reader of the plan must know of the refit, in a few words; may be empty."""


@runtime_checkable
class TracksAblations(Protocol):
    """A method that keeps attentions and MLPs zero that earlier stages have zeroed (ablated).

    After a method without it, the plan does not know which parts of blocks are zero.
    """

    def ablated(self, arch: Arch, known: Ablated) -> Ablated:
        """The parts known to be zero after it, given those `known` before it in a model `arch`.

        Raises:
            PlanError: it is to zero more parts than can be left.
        """


@runtime_checkable
class TimesMachine(Protocol):
    """A method that may measure this machine's speed to decide what it cuts."""

    @property
    def times_machine(self) -> bool:
        """Whether the machine's speed decides, with these keys: then the artifact's id names it."""


@dataclass(frozen=True)
class HealRecord:
    """What healing did; `log` is JSON, with `loss` as `StageLog` has it."""

    steps: int
    trained_tokens: int
    seconds: float
    log: Mapping[str, Any] = field(default_factory=dict)


HEALING_WINDOWS: Final = 2
"""The fewest windows that healing needs: one to train on, and one to measure with."""


class Healer(Protocol):
    """Trains a checkpoint to recover quality and writes a plain checkpoint again."""

    VERSION: ClassVar[str]

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (PlanError, MissingExtra)."""

    def cost(self, arch: Arch, tokens: int, length: int, machine: Machine) -> Cost:
        """Estimates the cost of healing on `tokens` available tokens, in windows of `length`."""

    def heal(self, checkpoint: Path, tokens: TokenSet, out: Path, work: Work) -> HealRecord:
        """Heals `checkpoint` into the directory `out`, resuming from `work.scratch`."""


@runtime_checkable
class Taught(Protocol):
    """A healer that may learn from another model, its teacher."""

    @property
    def taught(self) -> bool:
        """Whether this healer, with these keys, learns from a teacher."""

    @property
    def teacher(self) -> str | None:
        """A directory below the data root, or a Hub id; None: the model the recipe starts from."""

    def taught_cost(
        self, arch: Arch, teacher: Arch, samples: int, length: int, machine: Machine
    ) -> tuple[Cost, str]:
        """Estimates the cost of healing with a teacher; says in a few words how it is used."""


@dataclass(frozen=True)
class BuildRecord:
    """The record of an engine's build; `weight_bytes` are the weight bytes read by a decode step.

    `sparsity` is JSON: what the build shows of sparse kernels, empty where nothing was asked.
    """

    exporter: str
    version: str
    parameters: Mapping[str, Any]
    graph: str
    weight_bytes: int
    seconds: float
    toolchain: Mapping[str, str]
    notes: tuple[str, ...] = ()
    sparsity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON types, as the store and report.json hold it."""
        return asdict(self) | {
            "parameters": dict(self.parameters),
            "toolchain": dict(self.toolchain),
            "notes": list(self.notes),
            "sparsity": dict(self.sparsity),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BuildRecord:
        """What `to_json` wrote; of a report's engine, which may say less, the rest is empty or 0.

        Keys that stand beside it there, as the engine's directory, are left out.
        """
        return BuildRecord(
            exporter=data["exporter"],
            version=data.get("version", ""),
            parameters=dict(data.get("parameters", {})),
            graph=data.get("graph", ""),
            weight_bytes=data.get("weight_bytes") or 0,
            seconds=data.get("seconds") or 0.0,
            toolchain=dict(data.get("toolchain", {})),
            notes=tuple(data.get("notes", ())),
            sparsity=dict(data.get("sparsity", {})),
        )


class Runner(Protocol):
    """An opened engine with its KV cache inside; a context manager that frees it on exit.

    It times itself: `step` returns the seconds that the engine took, without the caller's work.
    """

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def reset(self) -> None:
        """Empties the KV cache."""

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Runs `ids` int64 `[batch, new]` after the tokens in the cache.

        Returns logits float32 `[batch, new or 1, vocab]` (the last position is always there) and
        the seconds that it took.
        """


class Exporter(Protocol):
    """Turns a checkpoint into an engine with a KV cache, and opens it again.

    What else is to be known of its engines are class attributes, each with a default
    (`exporter_facts.ExporterFacts`):

    RUNS_CODE: bool                   they hold machine code, so opening a stranger's would run it
    RUNS_ON: frozenset[str] | None    the devices that they run on, `frozenset({"cuda"})`; None: any
    PACKAGES: tuple[str, ...]         the distributions whose versions change what they do
    SPARSE_NOTE: SparseNote           what a report says beside their sparse weights
    EXAMPLE: str                      a template beside it: how to run one, for the model card
    RUNTIME: str                      what runs them, as the model card names it
    UNOPENED: str                     why `open` always refuses; empty: it opens them
    WRITES_CODES: bool                its int4 and int8 take a quantized checkpoint's codes exactly
    calibrates: bool                  it reads calibration data; may be a property of its keys
    runs_code: bool                   with these keys its engines hold machine code; as `calibrates`
    """

    VERSION: ClassVar[str]
    DIRECTORY: ClassVar[str]

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (PlanError, MissingExtra)."""

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates the cost of the export."""

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes the engine, tokenizer and generation config into the directory `out`."""

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the engine at `path`, as `export` wrote it."""


@runtime_checkable
class HasSparsity(Exporter, Protocol):
    """An exporter whose engines may run sparse kernels, or carry what is done for them."""

    def without_sparsity(self) -> Self | None:
        """The same exporter without sparse kernels, to measure their gain; None if it uses none."""


@dataclass(frozen=True)
class Placement:
    """Which execution provider runs the nodes of a graph: `asked` for, and counts by provider.

    `strayed` are nodes that multiply and are run by another provider than the one asked for.
    """

    asked: str
    providers: Mapping[str, int]
    strayed: tuple[str, ...] = ()


@runtime_checkable
class Bounded(Protocol):
    """An exporter whose engines take sequences of a bounded length."""

    def longest(self, config: Mapping[str, Any]) -> int | None:
        """The longest sequence, prompt and answer, that the engine of a model takes; None: any."""


@runtime_checkable
class LimitsBatch(Protocol):
    """A runner whose engine was built for a largest batch."""

    @property
    def most_sequences(self) -> int:
        """The largest batch of a step."""


@runtime_checkable
class PlacesNodes(Protocol):
    """A runner whose runtime distributes the nodes of a graph over execution providers."""

    def placement(self) -> Placement:
        """Which provider runs which nodes."""
