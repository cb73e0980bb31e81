"""`export: ort_genai`: the fastest engine on ONNX Runtime's CPU, for families its builder knows.

onnxruntime-genai's own model builder writes the graph (fused attention, weight-only quantized
matrices) and `genai_config.json`, so onnxruntime-genai runs the directory as it is. Every build is
loaded and compared with PyTorch before it counts. A checkpoint that is wide with zeros becomes a
narrow graph (`trim`); genai_config.json's `num_hidden_layers` then counts the caches.

Source: onnxruntime-genai 0.18, `onnxruntime_genai.models.builder`.
Differs: what it reads of the config is corrected where it would build a wrong graph or none
(windows of mistral and phi3, phi's epsilon, gemma3's two rotary bases, phi3's longrope). Options
that make it write graphs of tied models that ONNX Runtime refuses (asymmetric int4, int8 head over
int4) are not offered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.contracts import BuildRecord, Cost, Runner, Work
from prune_export.errors import CheckpointError, MissingExtra, PlanError, StageError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters._shared.ort_providers import runtime_version
from prune_export.exporters._shared.packed_keys import Packing, refuse_unpackable, sparsity_of
from prune_export.exporters._shared.side_files import copy_side_files
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters._shared.tuning import TUNING_S
from prune_export.exporters.ort_genai.graph import decode_bytes
from prune_export.exporters.ort_genai.programs import run_program as _run
from prune_export.exporters.ort_genai.runner import GRAPH, name_library, open_runner
from prune_export.exporters.ort_genai.support import corrections, refuse
from prune_export.kernels.compiling import LIBRARY, refuse_without_compiler
from prune_export.machine import Machine
from prune_export.units import MIB

if TYPE_CHECKING:
    from prune_export.exporters._shared.packed_graph import PackedGraph

_PACKAGES: Final = ("onnxruntime-genai", "onnx", "onnx-ir")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MAX_RELATIVE_ERROR: Final = {"fp32": 1e-3, "fp16": 5e-2}
"""Largest logit error as a fraction of the logits' standard deviation."""
_MAX_KL: Final = 0.1  # nats a token, for int8; SmolLM2-135M has 0.005
_GRAPHS_TRIED: Final = 5
"""Graphs that `tune` builds in an integer precision."""
_BITS: Final = {"fp32": 32.0, "fp16": 16.0, "int8": 9.0, "int4": 5.0}
"""A stored weight with its share of scales, at the default block size."""


@dataclass(frozen=True)
class OrtGenai:
    """onnxruntime-genai's graph: fused operators, int8 by default; the fastest on CPUs."""

    VERSION: ClassVar[str] = "2"
    DIRECTORY: ClassVar[str] = "genai"
    RUNS_CODE: ClassVar[bool] = False
    RUNS_ON: ClassVar[frozenset[str] | None] = None
    PACKAGES: ClassVar[tuple[str, ...]] = ("onnxruntime-genai",)
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote(
        unasked="multiplied dense: no kernels for sparse weights without `packed: sparse`",
    )
    EXAMPLE: ClassVar[str] = "example.md.j2"
    ALONE: ClassVar[str] = "genai_config.json"
    RUNTIME: ClassVar[str] = "onnxruntime-genai"

    calibrates: ClassVar[bool] = False
    WRITES_CODES: ClassVar[bool] = True
    LATER: ClassVar[Mapping[str, Any]] = {"head": "same", "tune": False, "packed": "no"}

    precision: Annotated[
        Literal["fp32", "fp16", "int8", "int4"],
        Field(description="int8 doubles decode speed, int4 costs quality, fp16 is slow on CPUs"),
    ] = "int8"
    logits: Annotated[
        Literal["last", "all"],
        Field(description="`last` computes the head for the last position only: faster prefill"),
    ] = "last"
    block_size: Annotated[
        Literal[16, 32, 64, 128, 256],
        Field(description="weights that share a scale, in int8 and int4"),
    ] = 32
    accuracy_level: Annotated[
        Literal[0, 1, 4],
        Field(description="int8 and int4 compute in: 4 int8, 1 float32, 0 what the kernel likes"),
    ] = 4
    head: Annotated[
        Literal["same", "int8", "int4"],
        Field(
            description="precision of the head, and of the embedding where they are tied, in int8 "
            "and int4: `same` as the blocks, but int8 where the checkpoint's own codes are written"
        ),
    ] = "same"
    tune: Annotated[
        bool,
        Field(
            description="measure here which block size, head and accuracy level (none of them "
            "coarser in what it computes than asked), threads, spinning and pages are fastest; "
            "threads and spinning go into genai_config.json, the rest into run.sh beside it"
        ),
    ] = False
    packed: Packing = "no"

    def __post_init__(self) -> None:
        refuse_unpackable("ort_genai", self.packed, self.precision, self.block_size, self.tune)

    @property
    def times_machine(self) -> bool:
        """Whether the engine depends on how fast this machine is."""
        return self.tune

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, what the builder does not know or gets wrong, or cannot run here.

        Raises:
            MissingExtra: onnx, onnxruntime or onnxruntime-genai is not installed.
            PlanError: the model is not one that the builder builds right.
        """
        del machine  # the engine is for CPUs, wherever it is built
        for package in _PACKAGES:
            try:
                metadata.version(package)
            except metadata.PackageNotFoundError as error:
                raise MissingExtra.of("exporter ort_genai", package, "onnx") from error
        if find_spec("onnxruntime") is None:  # whichever of its wheels
            raise MissingExtra.of("exporter ort_genai", "onnxruntime", "onnx")
        version = metadata.version("onnxruntime-genai")
        if not version.startswith("0.18."):
            raise PlanError(
                "exporter ort_genai",
                f"got onnxruntime-genai {version}, expected 0.18: its builder differs by version",
                'run `pip install "onnxruntime-genai>=0.18,<0.19"`',
            )
        refuse(arch)
        if self.packed != "no":
            refuse_without_compiler("ort_genai.packed")

    def longest(self, config: Mapping[str, Any]) -> int:
        """The longest context: the rows of the graph's rotary tables."""
        return int(config["max_position_embeddings"])

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory for the builder, which holds the whole model in fp32, and disk."""
        weights = 4 * arch.parameters()
        copies = 3 if self.precision.startswith("int") else 2  # measured: 2.8 and 1.3
        tries = _GRAPHS_TRIED if self.tune and self._bits else 1
        disk = int(arch.parameters() * _BITS[self.precision] / 8) + self._embedding_bytes(arch)
        return Cost(
            ram_bytes=600 * MIB + copies * weights,
            disk_bytes=disk,
            flops=2.0 * arch.parameters() * 64,
            moved_bytes=(2 * checkpoint_bytes + 2 * disk) * tries,
            seconds=(10.0 + 0.15 * arch.layers) * tries + (TUNING_S if self.tune else 0.0),
        )

    def _embedding_bytes(self, arch: Arch) -> int:
        """What the embedding takes more than its share of codes: the builder keeps it in fp32.

        Only one that is tied to an int4 head is read from the head's codes.
        """
        if not self._bits:
            return 0
        tied = any(tensor.tied_to for tensor in arch.tensors)
        size = arch.sizes["vocab"] * arch.sizes["residual"]
        if tied:
            return 0 if self._bits == 4 else 4 * size
        return int((4 - _BITS[self.precision] / 8) * size)

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes graph, `genai_config.json`, tokenizer and configs into `out`, and tries them.

        Raises:
            CheckpointError: the checkpoint has no tokenizer.
            StageError: the builder failed, or the engine does not compute what PyTorch does.
        """
        if self.tune:
            from prune_export.exporters.ort_genai.tuned import export_tuned

            return export_tuned(self, checkpoint, out, work)
        return self.export_tried(checkpoint, out, work)[0]

    def export_tried(self, checkpoint: Path, out: Path, work: Work) -> tuple[BuildRecord, float]:
        """Exports with these keys as they are; gives also the engine's KL from PyTorch in nats."""
        start = perf_counter()
        source = Checkpoint.open(checkpoint)
        if not any((checkpoint / name).is_file() for name in _TOKENIZERS):
            raise CheckpointError(
                str(checkpoint),
                f"has no tokenizer ({', '.join(_TOKENIZERS)}); onnxruntime-genai needs one",
                "copy the tokenizer of the base model beside the weights",
            )
        self._build(source, out, work)
        copy_side_files(source, out, replacing=False)  # the builder wrote some itself
        packed = self._pack(out, work)
        notes, kl, calls = self._try(checkpoint, out, work)
        record = BuildRecord(
            exporter="ort_genai",
            version=self.VERSION,
            parameters=asdict(self),
            graph=GRAPH,
            weight_bytes=decode_bytes(out / GRAPH),
            seconds=perf_counter() - start,
            toolchain={package: metadata.version(package) for package in _PACKAGES}
            | {"onnxruntime": runtime_version()},
            notes=tuple(
                filter(None, (Trim.of(source).note(), *notes, packed.note() if packed else ""))
            ),
            sparsity=sparsity_of(packed, calls, self.packed) if packed else {},
        )
        return record, kl

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the engine at `path`, as `export` wrote it, on the CPU."""
        return open_runner(path, machine, library=path / LIBRARY if self.runs_code else None)

    def without_sparsity(self) -> OrtGenai | None:
        """The same exporter with zeros stored like the rest; None where they are already."""
        return replace(self, packed="dense") if self.packed == "sparse" else None

    @property
    def runs_code(self) -> bool:
        """Whether its engines hold machine code: the kernel of packed weights."""
        return self.packed != "no"

    def _pack(self, out: Path, work: Work) -> PackedGraph | None:
        """Packs the weights, and names the kernel's library in the runtime's configuration."""
        if self.packed == "no":
            return None
        from prune_export.exporters._shared.packed_graph import pack_graph

        with work.progress.task("ort_genai: packing weights"):
            found = pack_graph(out / GRAPH, self.packed)
        name_library(out)
        return found

    def opened(self, path: Path, machine: Machine, *, spinning: bool) -> Runner:
        """Opens it for tuning, with threads that may spin."""
        return open_runner(path, machine, spinning=spinning)

    def _build(self, source: Checkpoint, out: Path, work: Work) -> None:
        config = source.full_config()
        layers = int(config["num_hidden_layers"])
        request = {
            "source": str(source.path.resolve()),
            "out": str(out.resolve()),
            "cache": str((work.scratch / "genai-cache").resolve()),
            "precision": self.precision,
            "bits": self._bits,
            "head_bits": self._head_bits(quantized=Grids.of(source) is not None),
            "block_size": self.block_size,
            "options": self._options(),
            "corrections": corrections(config),
        }
        with work.progress.task("ort_genai: building", total=layers + 2) as task:

            def follow(line: str) -> None:
                if line.startswith("Reading layer"):
                    task.advance()
                elif line.startswith(("Saving ONNX", "Saving processing")):
                    task.advance()
                    task.note(line.split(" in ", 1)[0])

            _run("build", request, work, follow)

    @property
    def _bits(self) -> int:
        return {"int4": 4, "int8": 8}.get(self.precision, 0)

    def _head_bits(self, *, quantized: bool) -> int:
        if self.head != "same":
            return {"int4": 4, "int8": 8}[self.head]
        return 8 if quantized and self._bits else self._bits

    def _options(self) -> dict[str, str]:
        options = {
            # A cache as long as the context for blocks with a sliding window, so that the graph
            # runs anywhere; bounded caches need onnxruntime-genai to feed them.
            "windowed_kv_cache": "false",
            "prune_lm_head": str(self.logits == "last").lower(),
        }
        if self.precision.startswith("int"):
            options |= {
                "block_size": str(self.block_size),
                "accuracy_level": str(self.accuracy_level),
            }
        return options

    def _try(self, checkpoint: Path, out: Path, work: Work) -> tuple[tuple[str, str], float, int]:
        """Compares with PyTorch; gives notes, KL in nats, how often a step calls our kernel."""
        answer = work.scratch / "genai-trial-answer.json"
        request = {
            "source": str(checkpoint.resolve()),
            "out": str(out.resolve()),
            "threads": work.machine.threads,
            "answer": str(answer.resolve()),
            "packed": self.packed != "no",
        }
        with work.progress.task("ort_genai: comparing with PyTorch"):
            _run("trial", request, work, lambda line: None)
        found = json.loads(answer.read_text(encoding="utf-8"))
        exact = Grids.of(Checkpoint.open(checkpoint)) is not None
        if problem := self._problem(found, exact=exact):
            fix = "use the exporter `onnx` for this model, and report this one"
            if self.precision == "int8":
                fix = (
                    "write `precision: fp32`, as a model that has lost much takes no rounding "
                    f"(its perplexity tells); where that fails too, {fix}"
                )
            raise StageError(f"ort_genai: {out}", problem, fix)
        tried = (
            f"tried on {found['positions']} positions: largest logit error "
            f"{found['max_error']:.1g}, KL {found['mean_kl']:.1g} nats, same choice "
            f"{found['same_choice']}; onnxruntime-genai generated {found['generated']} tokens"
        )
        return (tried, str(found["tokenizer"])), float(found["mean_kl"]), int(found["calls"])

    def _problem(self, found: Mapping[str, Any], *, exact: bool = False) -> str:
        """Says what is wrong with a trial's findings; empty when nothing is.

        `exact` says that the engine's 4 bits are PyTorch's weights; else anything may come of them.
        """
        rounded = self.precision == "int4" and not exact
        if not found["finite"]:
            return "the engine's logits are not finite"
        limit = _MAX_RELATIVE_ERROR.get(self.precision)
        relative = found["max_error"] / found["spread"]
        if limit is not None and relative > limit:
            return (
                f"logits are off by {relative:.1e} of their standard deviation, "
                f"expected at most {limit:.0e} in {self.precision}"
            )
        if self._bits and not rounded and found["mean_kl"] > _MAX_KL:
            return f"KL from PyTorch is {found['mean_kl']:.2g} nats, expected at most {_MAX_KL}"
        # Twice the error can turn a choice round; what is generated is not what was compared, so
        # twice that again.
        allowed = max(4 * found["max_error"], (limit or 0) * found["spread"])
        if not rounded and found["worst_choice"] > allowed:
            return (
                f"onnxruntime-genai chose a token {found['worst_choice']:.2g} logits below "
                f"PyTorch's best, expected at most {allowed:.2g}"
            )
        return ""
