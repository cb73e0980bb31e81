"""`onnx`: a portable ONNX graph with a KV cache, of standard operators only.

Inputs `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key`/`.value`, outputs
`logits` and `present.{i}.key`/`.value`: the names that the Hub's ONNX models have. Batch, sequence
and past are dynamic. States of convolutions and recurrences are caches too (`caches`). Tracing
costs seconds for every block, and blocks are alike, so one of each kind is traced and replicated
for the others; weights are copied from the checkpoint one at a time.

What a wide checkpoint holds as zeros (`trim`) is not in the graph: each block has the channels and
heads that are left of it, and none of a sub-block that only adds zero. `i` counts the caches, and a
block without attention has none; their head counts are in the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from math import prod
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import Field

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.checkpoint.loading import load_config
from prune_export.contracts import BuildRecord, Cost, Runner, Work
from prune_export.errors import MissingExtra, PlanError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters._shared.ort_providers import (
    Profile,
    Provider,
    ProviderName,
    present,
    runtime_version,
)
from prune_export.exporters._shared.packed_keys import Packing, refuse_unpackable
from prune_export.exporters._shared.rope import refuse_untraceable
from prune_export.exporters._shared.side_files import copy_side_files
from prune_export.exporters._shared.states import refuse_states
from prune_export.exporters._shared.tuning import TUNING_S
from prune_export.kernels.compiling import LIBRARY, refuse_without_compiler
from prune_export.machine import Machine
from prune_export.units import GIB

if TYPE_CHECKING:
    from prune_export.exporters._shared.packed_engine import PackedEngine
    from prune_export.exporters.onnx.slidesparse import Slid

_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 2, "int4": 2}  # the embedding stays fp32
_TORCH: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "float32"} | {
    "int4": "float32"
}
_PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Onnx:
    """A portable ONNX graph with a KV cache: opset 23, standard operators, any runtime."""

    precision: Annotated[
        Literal["fp32", "fp16", "bf16", "int8", "int4"],
        Field(
            description="of weights, cache and computation; int8 and int4 store matrices as codes "
            "with a scale for each block, those of a quantized checkpoint as they are, and keep "
            "the rest in fp32"
        ),
    ] = "fp32"
    logits: Annotated[
        Literal["all", "last"],
        Field(description="`last` computes the head for the last position only: faster prompts"),
    ] = "all"
    block_size: Annotated[
        Literal[16, 32, 64, 128, 256],
        Field(description="weights that share a scale where they are rounded, in int8 and int4"),
    ] = 32
    head: Annotated[
        Literal["same", "int8", "int4"],
        Field(
            description="precision of the head in int8 and int4: `same` as the blocks, but int8 "
            "where the checkpoint's own codes are written"
        ),
    ] = "same"
    accuracy_level: Annotated[
        Literal[0, 1, 4],
        Field(
            description="int8 and int4 compute here in: 4 int8, 1 float32, 0 what the kernel likes"
        ),
    ] = 4
    sliding: Annotated[
        bool,
        Field(
            description="rewrite weights that keep 2N-2 of every 2N (6 of 8, and so 4 of 8) as "
            "2 of 4, exactly, for hardware that knows no other pattern"
        ),
    ] = False
    tune: Annotated[
        bool,
        Field(
            description="measure here which accuracy level (of int8 and int4; none coarser than "
            "asked), threads, spinning and pages are fastest: written to run.sh and tuned.json"
        ),
    ] = False

    packed: Packing = "no"

    provider: Annotated[
        ProviderName,
        Field(
            description="who runs it here: `auto` is `cuda` where the machine has a GPU and "
            "onnxruntime knows it (onnxruntime-gpu), else `cpu`"
        ),
    ] = "auto"
    sparse: Annotated[
        bool,
        Field(description="let `provider: tensorrt` use kernels for weights that hold 2 of 4"),
    ] = False
    profile: Annotated[
        Profile, Field(description="shapes that `tensorrt` and `tensorrt_rtx` build for")
    ] = field(default_factory=Profile)
    provider_options: Annotated[
        dict[str, str | int | float | bool],
        Field(description="further options of the provider, by ONNX Runtime's own names"),
    ] = field(default_factory=dict)

    VERSION: ClassVar[str] = "3"
    DIRECTORY: ClassVar[str] = "onnx"
    RUNS_CODE: ClassVar[bool] = False
    RUNS_ON: ClassVar[frozenset[str] | None] = None
    PACKAGES: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime", "onnxruntime-gpu")
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote(
        unasked="multiplied dense: no kernels for sparse weights without `packed: sparse`",
        asked="the exporter `tensorrt` tells what is chosen",
    )
    EXAMPLE: ClassVar[str] = "example.md.j2"
    ALONE: ClassVar[str] = "model.onnx"
    RUNTIME: ClassVar[str] = "ONNX Runtime"

    calibrates: ClassVar[bool] = False
    WRITES_CODES: ClassVar[bool] = True
    LATER: ClassVar[Mapping[str, Any]] = {
        "block_size": 32, "head": "same", "accuracy_level": 4, "tune": False, "packed": "no",
    }  # fmt: skip

    def __post_init__(self) -> None:
        refuse_unpackable("onnx", self.packed, self.precision, self.block_size, self.tune)
        if self.packed != "no" and (self.provider not in ("auto", "cpu") or self.sliding):
            raise PlanError(
                "onnx.packed",
                "multiplies on the CPU, as weights are stored",
                "leave `provider` and `sliding` out, or `packed`",
            )
        self._provider()  # which refuses what cannot be
        if self.sliding and self._bits:
            raise PlanError(
                "onnx.sliding",
                f"is of no use with `precision: {self.precision}`, which rounds weights but "
                "multiplies in fp32",
                "write `precision: fp16`, or leave `sliding` out",
            )

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, a model or machine for which the export cannot work.

        Raises:
            MissingExtra: onnx, onnxscript or onnxruntime is not installed.
            PlanError: the model computes what no graph can, or nothing here can run it.
        """
        refuse_untraceable("export: onnx", arch)
        if self.provider.startswith("tensorrt"):
            refuse_states(f"onnx.provider: {self.provider}", arch)
        for package in _PACKAGES:
            if find_spec(package) is None:
                raise MissingExtra.of("export: onnx", package, "onnx")
        self._provider().check(machine)
        if self.packed != "no":
            refuse_without_compiler("onnx.packed")

    def longest(self, config: Mapping[str, Any]) -> int | None:
        """The length that TensorRT's providers build for; None, as others take any length."""
        del config
        return self.profile.length if self.provider.startswith("tensorrt") else None

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory and disk: the largest tensor twice, and the check of the whole graph."""
        size = _BYTES[self.precision]
        written = arch.parameters() * size
        largest = max(prod(arch.shape(tensor)) for tensor in arch.stored())
        return Cost(
            ram_bytes=int(1.2 * GIB + largest * (size * (2 if self.sliding else 1) + 8)),
            disk_bytes=written * (3 if self.sliding else 1),
            flops=2.0 * 6 * 2 * arch.parameters(),
            moved_bytes=2 * checkpoint_bytes + written * (6 if self.sliding else 2),
            seconds=12.0 + (TUNING_S if self.tune else 0.0),
        )

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes `model.onnx`, `model.onnx_data`, config and tokenizer into the directory `out`.

        Raises:
            PlanError: this model's code cannot be traced block by block.
            StageError: the written graph does not compute what PyTorch does.
        """
        start = perf_counter()
        import torch

        from prune_export.exporters._shared.trim import Trim
        from prune_export.exporters.onnx import replicate
        from prune_export.exporters.onnx import trace as tracing
        from prune_export.exporters.onnx import weights as weight_files
        from prune_export.exporters.onnx.widths import Fit

        opened = Checkpoint.open(checkpoint)
        trim = Trim.of(opened)
        grids = Grids.of(opened) if self._bits else None
        if grids:
            trim = trim.whole_parts()  # a group whose channels are cut has no grid any more
        blocks = table_for(str(opened.config.get("model_type"))).blocks
        config = load_config(checkpoint)
        dtype = getattr(torch, _TORCH[self.precision])
        last = self.logits == "last"
        out.mkdir(parents=True, exist_ok=True)
        with work.progress.task("trace one block of each kind", 1) as task:
            trace = tracing.trace(config, dtype, blocks, last=last, trim=trim)
            task.advance()
        fit = Fit.of(trim, trace.parameter_of) if trim else None
        source = replace(weight_files.Source.of(opened, trace), grids=grids)
        stamped = replicate.replicate_blocks(
            trace, last=last, coding=self._coding(source, blocks), fit=fit
        )
        narrow = replace(source, trim=trim)
        weight_files.write(stamped, narrow, dtype, out, work.progress)
        copy_side_files(opened, out)
        slid = self._slid(out, work)
        with work.progress.task("compare with PyTorch", 1) as task:
            note = self._compared(out, config, narrow, stamped.weights, work.machine)
            task.advance()
        packed = self._pack(out, work)
        chosen, tuned = self._tuned(out, int(opened.full_config()["vocab_size"]), work)
        return BuildRecord(
            exporter="onnx",
            version=self.VERSION,
            parameters=asdict(chosen) | {"opset": tracing.OPSET},
            graph="model.onnx",
            weight_bytes=weight_files.decode_bytes(stamped, dtype, trace.experts_visited)
            + (slid.added_bytes if slid else 0)
            + (packed.added_bytes if packed else 0),
            seconds=perf_counter() - start,
            toolchain=_toolchain(),
            notes=(
                f"{len(set(trace.kinds))} of {len(trace.kinds)} blocks traced",
                *([trim.note()] if trim else ()),
                note,
                *filter(None, (self._provider().note(work.machine),)),
                *(slid.notes() if slid else ()),
                *(packed.notes() if packed else ()),
                *tuned,
            ),
            sparsity=packed.sparsity(self.packed) if packed else self._sparsity(),
        )

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the engine at `path`, as `export` wrote it.

        Raises:
            StageError: the graph does not load, or the wanted provider does not run it.
        """
        return self.opened(path, machine, spinning=False)

    def opened(self, path: Path, machine: Machine, *, spinning: bool) -> Runner:
        """Opens it with threads that may spin, as `tune` tries."""
        from prune_export.exporters._shared.ort_runner import OrtRunner

        level = self.accuracy_level if self._bits else None
        return OrtRunner(
            path / "model.onnx", machine, provider=self._provider(), accuracy_level=level,
            spinning=spinning, library=path / LIBRARY if self.runs_code else None,
        )  # fmt: skip

    @property
    def times_machine(self) -> bool:
        """Whether the engine depends on how fast this machine is."""
        return self.tune

    def without_sparsity(self) -> Onnx | None:
        """The same exporter without SlideSparse and sparse kernels; None where it uses none."""
        packed: Packing = "dense" if self.packed == "sparse" else self.packed
        off = replace(self, sliding=False, sparse=False, packed=packed)
        return off if off != self else None

    @property
    def runs_code(self) -> bool:
        """Whether its engines hold machine code: the kernel of packed weights."""
        return self.packed != "no"

    def _sparsity(self) -> dict[str, Any]:
        return {"asked": True, "proven": None} if self.sparse else {}

    def _pack(self, out: Path, work: Work) -> PackedEngine | None:
        """Packs the weights, and holds the engine against itself before."""
        if self.packed == "no":
            return None
        from prune_export.exporters._shared.packed_engine import pack_engine

        plain = replace(self, packed="no", provider="cpu")
        with work.progress.task("pack weights", 1) as task:
            found = pack_engine(out / "model.onnx", self.packed, plain, self, work.machine)
            task.advance()
        return found

    @property
    def _bits(self) -> int:
        return {"int4": 4, "int8": 8}.get(self.precision, 0)

    def _coding(self, source: Any, blocks: str) -> Any:
        """How matrices are stored as codes; None where they are not."""
        from prune_export.exporters.onnx.coding import Coding, chooser

        if not self._bits:
            return None
        head = {"int4": 4, "int8": 8}.get(self.head, 8 if source.grids else self._bits)
        plain, of_head = (Coding(bits, self.block_size) for bits in (self._bits, head))
        return chooser(source, plain, of_head, blocks)

    def _tuned(self, out: Path, vocab: int, work: Work) -> tuple[Onnx, tuple[str, ...]]:
        """This with the accuracy level that is fastest here, and what was measured; if asked."""
        if not self.tune:
            return self, ()
        from prune_export.exporters._shared.tuning import settings_for, tune

        levels = dict.fromkeys((self.accuracy_level, 1)) if self._bits else ()
        keys = [{"accuracy_level": level} for level in levels] or [{}]
        own = {"precision": self.precision, "provider": self.provider}
        machine = replace(work.machine, device="cpu")
        found = tune(out, "onnx", own, settings_for(machine, keys), vocab, work)
        found.write(out, machine)
        return replace(self, **found.best.setting.keys), (found.note(),)

    def _provider(self) -> Provider:
        return Provider(
            "cpu" if self.packed != "no" else self.provider,
            self.precision,
            self.sparse,
            self.profile,
            self.provider_options,
        )

    def _slid(self, out: Path, work: Work) -> Slid | None:
        if not self.sliding:
            return None
        from prune_export.exporters.onnx.slidesparse import slide

        with work.progress.task("rewrite sparse weights", 1) as task:
            slid = slide(out / "model.onnx")
            task.advance()
        return slid

    def _compared(self, out: Path, config: Any, source: Any, weights: Any, machine: Machine) -> str:
        import onnx
        import torch

        from prune_export.exporters.onnx import check as checking

        dtype = getattr(torch, _TORCH[self.precision])
        # TensorRT reads this graph too, on a machine whose onnxruntime may know no GPU.
        if dtype == torch.bfloat16 and not (machine.device == "cuda" and present("cuda")):
            onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
            return "checked as a graph only: ONNX Runtime has no bfloat16 kernels for the CPU"
        if dtype != torch.bfloat16:  # the CPU's float32 accumulation is the stricter test
            machine = replace(machine, device="cpu")
        written = (out / "model.onnx_data").stat().st_size
        prepack = 2 * written + GIB < machine.ram_bytes
        error = checking.compare(
            out / "model.onnx", config, source, dtype, machine, weights=weights, prepack=prepack
        )
        return f"logits within {error:.1e} of PyTorch's, relative to the largest"


def _toolchain() -> Mapping[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    versions = {package: metadata.version(package) for package in packages}
    return versions | {"onnxruntime": runtime_version()}
