"""`export: gguf`: one file for llama.cpp, checked by llama.cpp itself where it is installed.

llama.cpp's packages for Python give no logits step by step, so such an engine is not opened here:
its parity and speed are not measured. Instead, where xllamacpp is installed, the export lets it
score what transformers generates, and the build record says how far the two are apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Annotated, ClassVar, Literal, NoReturn

from pydantic import Field

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import BuildRecord, Cost, Work
from prune_export.errors import MissingExtra, PlanError, StageError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters._shared.rope import refuse_untraceable
from prune_export.exporters._shared.side_files import copy_side_files
from prune_export.exporters.gguf.shapes import ARCHITECTURES
from prune_export.machine import Machine
from prune_export.units import GIB

FILE = "model.gguf"
_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Gguf:
    """A GGUF file for llama.cpp, of llama, mistral, qwen2 and qwen3.

    Not opened here: llama.cpp gives no logits step by step. Where xllamacpp is installed, the
    export compares what it generates with PyTorch; time the file with llama.cpp's `llama-bench`.
    """

    type: Annotated[
        Literal["f32", "f16", "q8_0"], Field(description="of matrices; vectors are f32")
    ] = "f16"
    keep_zeros: Annotated[
        bool, Field(description="keep heads and channels that are zero in single blocks")
    ] = False

    VERSION: ClassVar[str] = "1"
    DIRECTORY: ClassVar[str] = "gguf"
    RUNS_CODE: ClassVar[bool] = False
    RUNS_ON: ClassVar[frozenset[str] | None] = frozenset()
    PACKAGES: ClassVar[tuple[str, ...]] = ()
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote(
        unasked="multiplied dense: llama.cpp has no kernels for sparse weights"
    )
    EXAMPLE: ClassVar[str] = "example.md.j2"
    RUNTIME: ClassVar[str] = "llama.cpp"
    UNOPENED: ClassVar[str] = "llama.cpp gives no logits step by step; its build record has a check"
    calibrates: ClassVar[bool] = False

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, what llama.cpp has no architecture for.

        Raises:
            MissingExtra: the package gguf is not installed.
            PlanError: the family is another.
        """
        del machine
        refuse_untraceable("export: gguf", arch)
        if arch.family not in ARCHITECTURES:
            raise PlanError(
                f"export: gguf  model_type {arch.family}",
                "is not written as GGUF",
                f"these are: {', '.join(ARCHITECTURES)}; llama.cpp's own converter knows more",
            )
        if find_spec("gguf") is None:
            raise MissingExtra.of("export: gguf", "gguf", "gguf")

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory for the largest tensor and for the model that is compared, and disk."""
        size = int(arch.parameters() * _BYTES[self.type])
        return Cost(
            ram_bytes=GIB + 4 * arch.parameters() + size,
            disk_bytes=size,
            moved_bytes=2 * checkpoint_bytes + 2 * size,
            seconds=2.0,
        )

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes `model.gguf`, config and tokenizer into the directory `out`.

        Raises:
            PlanError: llama.cpp computes or splits text otherwise than this model.
            StageError: llama.cpp does not generate what PyTorch does.
        """
        start = perf_counter()
        from prune_export.exporters.gguf.writing import write_gguf

        out.mkdir(parents=True, exist_ok=True)
        opened = Checkpoint.open(checkpoint)
        name = str(opened.config["model_type"])  # of the directory the file would be another
        with work.progress.task("write GGUF", 1) as task:
            written = write_gguf(
                checkpoint, out / FILE, self.type, keep_zeros=self.keep_zeros, name=name
            )
            task.advance()
        copy_side_files(opened, out)
        toolchain = {name: metadata.version(name) for name in ("gguf", "torch", "transformers")}
        notes = [f"llama.cpp's architecture {written.architecture}, {written.tensors} tensors"]
        notes += [written.note] if written.note else []
        if find_spec("xllamacpp") is None:
            notes.append("not checked by llama.cpp: xllamacpp is not installed")
        else:
            from prune_export.exporters.gguf.check import compare

            with work.progress.task("compare with llama.cpp", 1) as task:
                notes.append(compare(checkpoint, out / FILE, self.type, work.machine))
                task.advance()
            toolchain["xllamacpp"] = metadata.version("xllamacpp")
        return BuildRecord(
            exporter="gguf",
            version=self.VERSION,
            parameters=asdict(self),
            graph=FILE,
            weight_bytes=written.bytes,
            seconds=perf_counter() - start,
            toolchain=toolchain,
            notes=tuple(notes),
        )

    def open(self, path: Path, machine: Machine) -> NoReturn:
        """Is refused.

        Raises:
            StageError: always.
        """
        del machine
        raise StageError(
            str(path / FILE), self.UNOPENED, f"run it with llama.cpp: `llama-cli -m {FILE}`"
        )
