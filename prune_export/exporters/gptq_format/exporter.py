"""`export: gptq_format`: a quantized checkpoint's codes in the safetensors layout of GPTQ.

transformers (with gptqmodel and optimum) and vLLM load the directory as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch

from prune_export.arch import Arch
from prune_export.arch.roles import CONTROLS
from prune_export.calibrate import as_matrix, inputs_last, linears
from prune_export.checkpoint import Checkpoint, Planned, write_checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.contracts import BuildRecord, Cost, Runner, Work
from prune_export.errors import CheckpointError, PlanError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters.gptq_format.layout import PARTS, WORD, packed, shapes
from prune_export.exporters.gptq_format.runner import CONFIG, GptqRunner
from prune_export.grids import Grid
from prune_export.machine import Machine
from prune_export.units import GIB

_DTYPES: dict[str, str] = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}


@dataclass(frozen=True)
class GptqFormat:
    """Codes in GPTQ's safetensors layout, of a model that a `quantize` stage made.

    For transformers (with gptqmodel) and vLLM. Symmetric grids are written as `gptq`, which most
    kernels take; others as `gptq_v2`. Measured here with PyTorch on unpacked weights: its speed is
    not that of their kernels.
    """

    VERSION: ClassVar[str] = "1"
    DIRECTORY: ClassVar[str] = "gptq"
    RUNS_CODE: ClassVar[bool] = False
    RUNS_ON: ClassVar[frozenset[str] | None] = None
    PACKAGES: ClassVar[tuple[str, ...]] = ()
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote(
        unasked="multiplied dense: no kernels for sparse weights here",
    )
    EXAMPLE: ClassVar[str] = "example.md.j2"
    RUNTIME: ClassVar[str] = "GPTQModel, vLLM"
    WRITES_CODES: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, matrices that the layout cannot hold.

        Raises:
            PlanError: experts, or matrices that are stored by their inputs.
        """
        del machine
        for tensor in linears(arch):
            if tensor.expert is not None or not inputs_last(tensor):
                what = "one of several experts" if tensor.expert is not None else "stored [in, out]"
                raise PlanError(
                    "exporter gptq_format",
                    f"{tensor.name} is {what}, which loaders of the layout do not expect",
                    "use the exporter `onnx`, which writes its codes",
                )

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory for the model in float32, with which it is measured, and disk."""
        return Cost(
            ram_bytes=GIB + 4 * arch.parameters(),
            disk_bytes=checkpoint_bytes // 2,
            moved_bytes=2 * checkpoint_bytes,
            seconds=2.0,
        )

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes weights, config, tokenizer and generation config into the directory `out`.

        Raises:
            CheckpointError: the checkpoint was not quantized, or its grids do not fit the layout.
        """
        start = perf_counter()
        opened = Checkpoint.open(checkpoint)
        grids = Grids.of(opened)
        if grids is None:
            raise CheckpointError(
                str(checkpoint),
                "has no grids: its weights were not quantized",
                "add a stage `quantize: {method: gptq}` at the end of the recipe",
            )
        written = _Written(opened, grids)
        result = write_checkpoint(
            out, opened.config, list(written.planned()), side_files=opened.side_files(),
            progress=work.progress,
        )  # fmt: skip
        config = dict(opened.config) | {"quantization_config": written.about()}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (out / CONFIG).write_text(text, encoding="utf-8")
        kind = written.about()["checkpoint_format"]
        return BuildRecord(
            exporter="gptq_format",
            version=self.VERSION,
            parameters={},
            graph=result.files[0].name,
            weight_bytes=sum(
                entry.nbytes for name, entry in result.entries.items() if "embed" not in name
            ),
            seconds=perf_counter() - start,
            toolchain={name: metadata.version(name) for name in ("torch", "transformers")},
            notes=(
                f"{len(written.names)} matrices in {written.form.bits} bits, format {kind}",
                "timed with PyTorch on unpacked weights, not with kernels for codes",
            ),
        )

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the directory at `path`, as `export` wrote it, with PyTorch on the CPU."""
        return GptqRunner(path, machine)


@dataclass(frozen=True)
class _Written:
    """A checkpoint's tensors in the layout."""

    checkpoint: Checkpoint
    grids: Grids

    @cached_property
    def arch(self) -> Arch:
        full = self.checkpoint.full_config()
        return Arch.from_config(full, ignore_keys=full.keys())

    @cached_property
    def names(self) -> list[str]:
        return list(self.grids)

    @cached_property
    def form(self) -> Grid:
        """A grid of the kind that all are of."""
        first = self.grids.read(self.names[0])
        for name in self.names:
            rows, inputs = self.checkpoint.entries[name].shape
            grid = self.grids.read(name)
            per_word = WORD // grid.bits
            if not grid.like(first) or inputs % grid.group_size or rows % per_word:
                raise CheckpointError(
                    f"{self.checkpoint.path}  {name}",
                    f"[{rows}, {inputs}] in groups of {grid.group_size} does not fit GPTQ's "
                    f"layout: groups must divide inputs, {per_word} outputs, and all be alike",
                    "write a smaller `group_size` in the quantize stage, or `exclude` the role",
                )
        return first

    def planned(self) -> Iterator[Planned]:
        """The tensors to write: of a quantized matrix, its parts."""
        bits, size = self.form.bits, self.form.group_size
        for name, entry in self.checkpoint.entries.items():
            if name not in self.grids:
                yield Planned(name, entry.dtype, entry.shape, entry)
                continue
            rows, inputs = entry.shape
            for part, shape in shapes(rows, inputs, inputs // size, bits).items():
                stem = name.removesuffix("weight")
                yield Planned(
                    f"{stem}{part}", _DTYPES[part], shape, partial(self._part, name, part)
                )

    def _part(self, name: str, part: str) -> torch.Tensor:
        grid = self.grids.read(name)
        matrix = as_matrix(self.arch.by_name[name], self.checkpoint.read(name))
        return packed(self.grids.codes(name, matrix, grid), grid)[part]

    def about(self) -> Mapping[str, Any]:
        """The `quantization_config` of config.json."""
        form = self.form
        symmetric = form.zeros is None
        about: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": form.bits,
            "group_size": form.group_size,
            "desc_act": False,
            "sym": symmetric,
            "lm_head": False,
            "checkpoint_format": "gptq" if symmetric else "gptq_v2",
            "format": "gptq" if symmetric else "gptq_v2",
            "pack_dtype": "int32",
        }
        left = {t.role: t.name for t in linears(self.arch) if t.name not in self.grids}
        left |= {
            tensor.role: tensor.name
            for tensor in self.arch.tensors
            if tensor.role in CONTROLS - {"linear.decay"} and len(tensor.dims.of) == 2
        }
        if left:
            # What is not quantized, by the last part of its module's name.
            ends = sorted({name.rsplit(".", 2)[1] for name in left.values()})
            about["dynamic"] = {f"-:.*{end}.*": {} for end in ends}
        return about


assert set(_DTYPES) == set(PARTS)
