"""`tensorrt`: an engine for NVIDIA GPUs, by TensorRT 10, TensorRT 11 or TensorRT-RTX.

The graph is the one of `onnx`, brought into the form that the parser takes. Networks are strongly
typed: each number is computed in the type that the graph says. TensorRT builds on the GPU that is
to run the engine; TensorRT-RTX builds ahead of time, on a machine without a GPU, and chooses
kernels on the device.

With `sparse`, the builder may use kernels for weights that hold 2 of 4. It times them against dense
ones and keeps the faster, so the flag proves nothing: the build record has what the builder said of
eligible and chosen layers, and the kernels' names.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import BuildRecord, Cost, Runner, Work
from prune_export.errors import MissingExtra, PlanError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters._shared.rope import refuse_untraceable
from prune_export.exporters._shared.side_files import copy_files
from prune_export.exporters._shared.states import refuse_states
from prune_export.exporters.onnx import Onnx
from prune_export.exporters.tensorrt import rules
from prune_export.exporters.tensorrt.binding import EXTRAS, Binding, Flavor, installed
from prune_export.exporters.tensorrt.profiles import Sizes, Span
from prune_export.machine import Machine
from prune_export.units import GIB

ENGINE: Final = "model.engine"
_GRAPH: Final[Mapping[str, Literal["fp32", "fp16", "bf16"]]] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8": "fp16",
    "int8": "fp16",
}
"""The graph that each precision starts from."""
_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
_PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
_BATCH: Final = Span(1, 4)
_PROMPT: Final = Span(512, 2048)
_CONTEXT: Final = Span(1024, 4096)


@dataclass(frozen=True)
class Tensorrt:
    """An engine for NVIDIA GPUs, with sparse kernels where they are faster."""

    flavor: Annotated[
        Flavor,
        Field(
            description="`tensorrt` builds on the GPU that runs the engine; `rtx` builds ahead of "
            "time for GeForce and RTX GPUs"
        ),
    ] = "tensorrt"
    precision: Annotated[
        Literal["fp16", "bf16", "fp32", "fp8", "int8"],
        Field(
            description="of weights, cache and computation; in fp8 and int8 the blocks' linears "
            "multiply 8 bits with 8 bits, and the rest is fp16"
        ),
    ] = "fp16"
    sparse: Annotated[
        bool, Field(description="let the builder use kernels for weights that hold 2 of 4")
    ] = False
    sliding: Annotated[
        bool,
        Field(
            description="rewrite weights that keep 2N-2 of every 2N (6 of 8, and so 4 of 8) as "
            "2 of 4, exactly"
        ),
    ] = False
    batch: Annotated[Span, Field(description="sequences at once")] = _BATCH
    prompt: Annotated[Span, Field(description="prompt tokens that are fed at once")] = _PROMPT
    context: Annotated[Span, Field(description="tokens of prompt and answer in all")] = _CONTEXT
    logits: Annotated[
        Literal["last", "all"],
        Field(description="`last` computes the head for the last position only: faster prompts"),
    ] = "last"
    compute_capability: Annotated[
        str,
        Field(description="GPU to build for: `current`, or with `rtx` `sm89`, `sm120` …"),
    ] = "current"
    version_compatible: Annotated[
        bool,
        Field(description="let later TensorRT versions load the engine; it then brings code along"),
    ] = False

    VERSION: ClassVar[str] = "1"
    DIRECTORY: ClassVar[str] = "tensorrt"
    RUNS_CODE: ClassVar[bool] = True
    RUNS_ON: ClassVar[frozenset[str] | None] = frozenset({"cuda"})
    PACKAGES: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt_rtx_cu13_bindings")
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote()
    EXAMPLE: ClassVar[str] = ""
    RUNTIME: ClassVar[str] = "TensorRT"

    @property
    def calibrates(self) -> bool:
        """Whether activations are measured before the build."""
        return self.precision in ("fp8", "int8")

    def __post_init__(self) -> None:
        rules.refuse_settings(
            self.flavor,
            self.compute_capability,
            sparse=self.sparse,
            precision=self.precision,
            version_compatible=self.version_compatible,
        )
        if self.prompt.most > self.context.most:
            raise PlanError(
                "tensorrt.prompt",
                f"got prompts of {self.prompt.most} tokens in a context of {self.context.most}",
                f"write `prompt: {{best: 512, most: {self.context.most}}}`, or a longer context",
            )

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, a model or machine for which the export cannot work.

        Raises:
            MissingExtra: onnx, onnxscript, onnxruntime or the flavor's library is not installed.
            PlanError: this machine cannot build it, or this GPU cannot run it.
        """
        refuse_untraceable("export: tensorrt", arch)
        refuse_states("export: tensorrt", arch)
        for package in _PACKAGES:
            if find_spec(package) is None:
                raise MissingExtra.of("export: tensorrt", package, "onnx")
        if not installed(self.flavor):
            raise MissingExtra.of(
                f"export: tensorrt  flavor: {self.flavor}",
                "tensorrt" if self.flavor == "tensorrt" else "tensorrt_rtx_bindings",
                EXTRAS[self.flavor],
            )
        rules.refuse_machine(
            self.flavor,
            self.compute_capability,
            machine,
            sparse=self.sparse,
            precision=self.precision,
        )

    def longest(self, config: Mapping[str, Any]) -> int:
        """The longest context that the engine is built for."""
        del config
        return self.context.most

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory and disk: the graph, and a builder that holds weights three times."""
        weights = arch.parameters() * _BYTES[self.precision]
        weights += weights // 2 if self.sliding else 0  # 6 of 8 becomes 12 for every 8
        graph = self._graph().cost(arch, checkpoint_bytes)
        return Cost(
            ram_bytes=max(graph.ram_bytes, int(1.5 * GIB) + 3 * weights),
            gpu_bytes=0 if self.flavor == "rtx" else 2 * weights + GIB,
            disk_bytes=graph.disk_bytes + weights,
            flops=graph.flops,
            moved_bytes=graph.moved_bytes + 4 * weights,
            seconds=graph.seconds + 10.0 + 0.6 * arch.layers,
        )

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes `model.engine`, its build log, config and tokenizer into the directory `out`.

        Raises:
            PlanError: this model's code cannot be traced block by block.
            StageError: the graph does not compute what PyTorch does, or the builder refuses it.
        """
        start = perf_counter()
        from prune_export.exporters.tensorrt import build as tensorrt_build
        from prune_export.exporters.tensorrt import proof as tensorrt_proof
        from prune_export.exporters.tensorrt.graph import adapt
        from prune_export.exporters.tensorrt.log import Log

        binding = Binding.load(self.flavor)
        graph = work.scratch / "graph"
        made = self._graph().export(checkpoint, graph, work)
        saved, rounded = self._quantized(checkpoint, graph, work)
        weights = tensorrt_proof.counted(graph / "model.onnx")
        adapt(graph / "model.onnx")
        out.mkdir(parents=True, exist_ok=True)
        log, cache = Log(), work.scratch / "timing.cache"
        with work.progress.task("build the engine", 1) as task:
            try:
                tensorrt_build.build(
                    binding, graph / "model.onnx", self._settings(), out / ENGINE, cache, log
                )
            finally:
                told = log.text.replace(f"{graph}/", "")  # a published log names no folder of ours
                (work.scratch / "build.log").write_text(told, encoding="utf-8")
            task.advance()
        copy_files(_carried(graph, work.scratch), out)
        sparsity, notes = self._sparsity(binding, out, log, weights)
        shutil.rmtree(graph)
        return BuildRecord(
            exporter="tensorrt",
            version=self.VERSION,
            parameters=asdict(self),
            graph=ENGINE,
            weight_bytes=made.weight_bytes - saved,
            seconds=perf_counter() - start,
            toolchain={**made.toolchain, _package(self.flavor): binding.version},
            notes=(*made.notes, *rounded, *notes),
            sparsity=sparsity,
        )

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the engine at `path`, as `export` wrote it.

        Raises:
            StageError: there is no GPU, or the engine does not load on it.
        """
        from prune_export.exporters.tensorrt.runner import TrtRunner

        return TrtRunner(
            path / ENGINE,
            machine,
            flavor=self.flavor,
            context=self.context.most,
            sequences=self.batch.most,
            host_code=self.version_compatible,
        )

    def without_sparsity(self) -> Tensorrt | None:
        """The same exporter without SlideSparse and sparse kernels; None where it uses none."""
        off = replace(self, sliding=False, sparse=False)
        return off if off != self else None

    def _graph(self) -> Onnx:
        return Onnx(precision=_GRAPH[self.precision], logits=self.logits, sliding=self.sliding)

    def _quantized(self, checkpoint: Path, folder: Path, work: Work) -> tuple[int, tuple[str, ...]]:
        """Quantizes the graph where the precision asks for it; gives bytes saved and a record."""
        if self.precision not in ("fp8", "int8"):
            return 0, ()
        from prune_export.exporters.tensorrt.calibration import calibration
        from prune_export.exporters.tensorrt.quantize import (
            kl,
            last_logits,
            observed,
            quantize,
            ranges,
        )

        vocabulary = int(Checkpoint.open(checkpoint).config["vocab_size"])
        ids, source = calibration(checkpoint, work.tokens, vocabulary)
        with work.progress.task("measure activations", 1) as task:
            observed(folder / "model.onnx", folder / "observed.onnx")
            reached = ranges(folder / "observed.onnx", ids, work.machine.threads)
            (folder / "observed.onnx").unlink()
            task.advance()
        some = _short(ids)
        before = last_logits(folder / "model.onnx", some, work.machine.threads)
        done = quantize(folder / "model.onnx", self.precision, reached)
        after = last_logits(folder / "model.onnx", some, work.machine.threads)
        return done.saved_bytes, (
            f"{done.products} products in {self.precision}, {done.left} with outliers in fp16; "
            f"{done.activations} activations measured on {source}",
            f"KL from fp16 {kl(before, after):.2g} nats after {len(some)} texts of "
            f"{some.shape[1]} tokens, computed by ONNX Runtime",
        )

    def _settings(self) -> Any:
        from prune_export.exporters.tensorrt.build import Settings

        target = None if self.compute_capability == "current" else self.compute_capability
        sizes = Sizes(self.batch, self.prompt, self.context)
        return Settings(sizes, self.sparse, self.version_compatible, target)

    def _sparsity(
        self, binding: Binding, out: Path, log: Any, weights: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Records what is known of sparse kernels, and words it in a sentence."""
        from prune_export.exporters.tensorrt import build as tensorrt_build
        from prune_export.exporters.tensorrt import proof as tensorrt_proof

        layers = None
        if not binding.features.builds_ahead:
            told, layers = tensorrt_build.inspected(
                binding, out / ENGINE, host_code=self.version_compatible
            )
            (out / "layers.json").write_text(told, encoding="utf-8")
        return tensorrt_proof.record(self.sparse, log, layers, weights)


def _short(ids: np.ndarray) -> np.ndarray:
    """At most 8 windows of at most 64 tokens of `ids` `[windows, length]`."""
    length = min(64, ids.size)
    return ids.reshape(-1)[: ids.size // length * length].reshape(-1, length)[:8]


def _carried(graph: Path, scratch: Path) -> Iterator[Path]:
    """Copies config, tokenizer, build log and timing cache: all but the graph."""
    for file in (*graph.iterdir(), scratch / "build.log", scratch / "timing.cache"):
        if file.is_file() and not file.name.startswith("model.onnx"):
            yield file


def _package(flavor: Flavor) -> str:
    return "tensorrt" if flavor == "tensorrt" else "tensorrt-rtx"
