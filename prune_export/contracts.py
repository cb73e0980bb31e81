"""What a method, a healer, an exporter and a runner are: the whole of what a plug-in implements.

Each is a frozen dataclass in one file; its fields are its keys in the recipe, its docstring is its
help, and `VERSION` is raised whenever the same input would give other bytes. `docs/your-own.md`
shows one of each but the healer, and `plugins` has all of it in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Protocol, Self, runtime_checkable

import numpy as np

from prune_export.ablated import Ablated
from prune_export.arch import Arch
from prune_export.calibrate import ExtraPass, ModelView, Statistic, TokenSet
from prune_export.machine import Machine
from prune_export.progress import Progress
from prune_export.surgery import Edit


@dataclass(frozen=True)
class Cost:
    """What a piece of work takes at its peak; `plan` adds it up and refuses what exceeds a limit.

    `flops` (multiplications and additions) and `moved_bytes` (disk reads and writes) are turned
    into seconds with this machine's measured rates; `seconds` is time that neither explains, such
    as tracing a graph.
    """

    ram_bytes: int = 0
    gpu_bytes: int = 0
    disk_bytes: int = 0
    flops: float = 0.0
    moved_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Work:
    """The means a running stage gets.

    `scratch` is a directory that outlives a killed run: long work keeps its checkpoints there and
    goes on from them. It is removed when the stage is complete. `tokens` is calibration data, for
    exporters that ask for it and where the recipe has it.
    """

    machine: Machine
    progress: Progress
    scratch: Path
    tokens: TokenSet | None = None


@dataclass(frozen=True)
class Decision:
    """What a method decided: the edits, and why, for the manifest and the report.

    `log` is JSON: `dropped` and `kept` for depth methods; `distance_map` ((L+1) x (L+1), None
    where undefined) and `block_scores` (one number a block, `block_score_name` says of what) where
    the method has them.
    """

    edits: Iterable[Edit]
    log: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """Decides what to cut. It never touches a weight: it returns edits, and surgery cuts."""

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
        """What to cut, from the statistics and, where it asks, the weights."""


@runtime_checkable
class HasPlanNote(Protocol):
    """What a method has besides where the plan is to say something about it."""

    def note(self, arch: Arch) -> str:
        """What a reader of the plan must know, in a few words; empty where it is nothing."""


@runtime_checkable
class Refitting(Protocol):
    """What a method has besides where it does more if its stage has data, and less if not."""

    @property
    def needs_data(self) -> bool:
        """Whether it is to be refused without."""

    def passes_with_data(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The passes that `decide` then runs, beyond those that `statistics` tells.

        Raises:
            PlanError: the parameters cannot work on this model.
        """

    def refit_note(self, arch: Arch) -> str:
        """What a reader of the plan must know of them, in a few words; empty where nothing."""


@runtime_checkable
class TracksAblations(Protocol):
    """What a method has besides where it keeps zero what earlier stages zeroed of blocks.

    After a method without it, nothing is known of such zeros in the plan.
    """

    def ablated(self, arch: Arch, known: Ablated) -> Ablated:
        """What is known after it, of a model `arch` before it.

        Raises:
            PlanError: it is to zero more parts than can be left.
        """


@dataclass(frozen=True)
class HealRecord:
    """What healing did; `log` is JSON with `loss` as [[step, loss, learning rate], …]."""

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
        """What healing takes, for `tokens` available training tokens in windows of `length`."""

    def heal(self, checkpoint: Path, tokens: TokenSet, out: Path, work: Work) -> HealRecord:
        """Heals `checkpoint` into the directory `out`, resuming from `work.scratch`."""


@dataclass(frozen=True)
class BuildRecord:
    """How an engine was built; `weight_bytes` is what one decode step must read of weights.

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
        """Forgets the cache."""

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Feeds `ids` int64 `[batch, new]` after what the cache holds.

        Returns logits float32 `[batch, new or 1, vocab]` (the last position is always there) and
        the seconds that it took.
        """


class Exporter(Protocol):
    """Turns a checkpoint into an engine with a KV cache, and opens it again.

    One whose engines hold machine code, so that opening a stranger's would run it, says so with
    `RUNS_CODE: ClassVar[bool] = True`; one whose engines run on some devices only, with
    `RUNS_ON: ClassVar[frozenset[str]] = frozenset({"cuda"})`; one that reads calibration data, with
    a property `calibrates`.
    """

    VERSION: ClassVar[str]
    DIRECTORY: ClassVar[str]

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (PlanError, MissingExtra)."""

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """What the export takes."""

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes the engine, tokenizer and generation config into the directory `out`."""

    def open(self, path: Path, machine: Machine) -> Runner:
        """A runner for what `export` wrote at `path`."""


@runtime_checkable
class HasSparsity(Exporter, Protocol):
    """An exporter whose engines may run sparse kernels, or carry what is done for them."""

    def without_sparsity(self) -> Self | None:
        """The same with all of that left out, to tell its gain; None where nothing is done."""


@dataclass(frozen=True)
class Placement:
    """Who runs the nodes of a graph: `asked` for, and how many each provider was given.

    `strayed` are nodes that multiply and are run by another provider than the one asked for.
    """

    asked: str
    providers: Mapping[str, int]
    strayed: tuple[str, ...] = ()


@runtime_checkable
class Bounded(Protocol):
    """An exporter whose engines take sequences of a bounded length."""

    def longest(self, config: Mapping[str, Any]) -> int | None:
        """The most tokens, prompt and answer, that the engine of a model takes; None: any."""


@runtime_checkable
class LimitsBatch(Protocol):
    """A runner whose engine was built for so many sequences at once, and takes no more."""

    @property
    def most_sequences(self) -> int:
        """The largest batch of a step."""


@runtime_checkable
class PlacesNodes(Protocol):
    """A runner whose runtime hands out the nodes of a graph to several providers."""

    def placement(self) -> Placement:
        """Who runs what."""
