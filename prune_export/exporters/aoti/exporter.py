"""`aoti`: PyTorch's own ahead-of-time compiler, with a KV cache, for the device of this machine.

With `sparse`, linear layers that hold 2 of 4 run on sparse tensor cores where that is faster: both
of PyTorch's kernels are timed at the model's shapes on the GPU at hand, and where none wins the
layer stays dense and the record says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, ClassVar, Final, Literal

import numpy as np
from pydantic import Field

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_model
from prune_export.contracts import BuildRecord, Cost, Runner, Work
from prune_export.errors import PlanError
from prune_export.exporter_facts import SparseNote
from prune_export.exporters._shared.logit_check import PROMPT, refuse_other_logits
from prune_export.exporters._shared.rope import refuse_untraceable
from prune_export.exporters._shared.side_files import copy_side_files
from prune_export.exporters._shared.states import refuse_states
from prune_export.machine import Machine
from prune_export.units import GIB

_BYTES: Final = {"fp32": 4, "fp16": 2, "bf16": 2}
_TORCH: Final = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_TOLERANCE: Final = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 2e-1}
"""Largest logit error allowed, as a fraction of the largest logit."""


@dataclass(frozen=True)
class Aoti:
    """PyTorch's ahead-of-time compiler; on GPUs with sparse kernels where they are faster."""

    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], Field(description="of weights, cache and computation")
    ] = "fp32"
    logits: Annotated[
        Literal["all", "last"],
        Field(description="`last` computes the head for the last position only: faster prompts"),
    ] = "last"
    sparse: Annotated[
        bool,
        Field(description="run weights that hold 2 of 4 by sparse kernels where these are faster"),
    ] = False
    tokens: Annotated[
        int, Field(ge=1, description="tokens at once at which a sparse kernel must be faster")
    ] = 512

    VERSION: ClassVar[str] = "1"
    DIRECTORY: ClassVar[str] = "aoti"
    RUNS_CODE: ClassVar[bool] = True
    RUNS_ON: ClassVar[frozenset[str] | None] = None
    PACKAGES: ClassVar[tuple[str, ...]] = ("torch",)
    SPARSE_NOTE: ClassVar[SparseNote] = SparseNote()
    EXAMPLE: ClassVar[str] = ""
    RUNTIME: ClassVar[str] = "PyTorch, compiled (AOTInductor)"

    calibrates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.sparse and self.precision == "fp32":
            raise PlanError(
                "aoti.sparse",
                "multiplies on tensor cores, which would round fp32 to 10 bits",
                "write `precision: bf16`",
            )

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses, in the plan, a model or machine for which the export cannot work.

        Raises:
            PlanError: there is no C++ compiler, no GPU for sparse kernels, or no CUDA toolkit; or
                the model computes what cannot be compiled.
        """
        refuse_untraceable("export: aoti", arch)
        refuse_states("export: aoti", arch)
        if not any(map(shutil.which, ("g++", "c++", "clang++"))):
            raise PlanError(
                "export: aoti", "needs a C++ compiler, and none is on the PATH",
                "install g++, or use another exporter",
            )  # fmt: skip
        if self.sparse and machine.device == "cpu":
            raise PlanError(
                "aoti.sparse",
                "needs an NVIDIA GPU: PyTorch has no kernels for sparse weights on a CPU",
                "leave `sparse` out, or run it on the machine with the GPU",
            )
        if machine.device == "cuda":
            _refuse_without_headers()

    def cost(self, arch: Arch, checkpoint_bytes: int) -> Cost:
        """Estimates memory and disk: the whole model, its copy in the package, and the compiler."""
        weights = arch.parameters() * _BYTES[self.precision]
        return Cost(
            ram_bytes=int(1.5 * GIB) + 4 * weights,
            gpu_bytes=2 * weights + GIB // 2,
            disk_bytes=2 * weights,
            flops=2.0 * 20 * arch.parameters(),
            moved_bytes=2 * checkpoint_bytes + 4 * weights,
            seconds=45.0 + 4.0 * arch.layers,
        )

    def export(self, checkpoint: Path, out: Path, work: Work) -> BuildRecord:
        """Writes `model.pt2`, `aoti.json`, config and tokenizer into the directory `out`.

        Raises:
            PlanError: torch.export cannot follow this model's code.
            StageError: the package does not compute what PyTorch does.
        """
        start = perf_counter()
        import torch

        from prune_export.exporters.aoti import graph as step_graph
        from prune_export.exporters.aoti import runner as step_runner

        opened = Checkpoint.open(checkpoint)
        out.mkdir(parents=True, exist_ok=True)
        model = self._loaded(checkpoint, work.machine)
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, PROMPT + 1))
        with torch.no_grad():
            fed = torch.from_numpy(ids).to(work.machine.device)
            expected = model(fed, use_cache=False).logits.float().cpu().numpy()
        sizes = step_graph.cache_sizes(model)
        read = _read_bytes(model)
        sparsity, notes, saved = self._made_sparse(model, work)
        with work.progress.task("compile", 1) as task:
            step_graph.compiled(model, sizes, out / step_runner.PACKAGE, last=self.logits == "last")
            task.advance()
        about = {"device": work.machine.device, "dtype": _TORCH[self.precision], "cache": sizes,
                 "torch": torch.__version__}  # fmt: skip
        (out / step_runner.ABOUT).write_text(json.dumps(about), encoding="utf-8")
        copy_side_files(opened, out)
        del model
        if work.machine.device == "cuda":
            torch.cuda.empty_cache()  # the package gets memory of its own, not torch's
        error = self._compared(out, ids, expected, work.machine)
        return BuildRecord(
            exporter="aoti",
            version=self.VERSION,
            parameters=asdict(self),
            graph=step_runner.PACKAGE,
            weight_bytes=read - saved,
            seconds=perf_counter() - start,
            toolchain={"torch": torch.__version__},
            notes=(
                f"logits within {error:.1e} of PyTorch's, relative to the largest",
                f"compiled for {work.machine.device}", *notes,
            ),
            sparsity=sparsity,
        )  # fmt: skip

    def open(self, path: Path, machine: Machine) -> Runner:
        """Opens the engine at `path`, as `export` wrote it.

        Raises:
            StageError: it was compiled for another device, or does not load.
        """
        from prune_export.exporters.aoti.runner import AotiRunner

        return AotiRunner(path, machine)

    def without_sparsity(self) -> Aoti | None:
        """The same exporter without sparse kernels; None where it uses none."""
        return replace(self, sparse=False) if self.sparse else None

    def _loaded(self, checkpoint: Path, machine: Machine) -> Any:
        import torch

        model = load_model(
            checkpoint, dtype=getattr(torch, _TORCH[self.precision]), attn_implementation="sdpa"
        )
        return model.eval().requires_grad_(False).to(machine.device)

    def _made_sparse(
        self, model: Any, work: Work
    ) -> tuple[Mapping[str, Any], tuple[str, ...], int]:
        """Replaces layers by faster sparse ones; gives record, notes, and bytes saved a step."""
        if not self.sparse:
            return {}, (), 0
        from prune_export.exporters.aoti import sparse as kernels

        layers = dict(kernels.candidates(model, model.get_output_embeddings()))
        sizes = {name: (one.out_features, one.in_features) for name, one in layers.items()}
        with work.progress.task("time sparse kernels", 1) as task:
            timings = kernels.probed(
                sizes.values(), _TORCH[self.precision], self.tokens, work.machine.device
            )
            task.advance()
        best = kernels.chosen(timings)
        held = _held(model)
        done = kernels.replaced(model, layers, best)
        tactics = {
            name: f"{kernel}, {best[sizes[name]][1]:.2f}x of dense at {self.tokens} tokens"
            for name, kernel in done.items()
        }
        saved = sum(sizes[name][0] * sizes[name][1] for name in done) * 7 // 16
        found = {
            "asked": True, "proven": bool(done), "eligible": len(layers), "chosen": len(done),
            "eligible_layers": list(layers), "chosen_layers": list(done), "tactics": tactics,
            "timings": [asdict(one) for one in timings], "weights": {"held": held},
        }  # fmt: skip
        return found, (_sentence(len(layers), done, timings),), saved * _BYTES[self.precision]

    def _compared(
        self, out: Path, ids: np.ndarray, expected: np.ndarray, machine: Machine
    ) -> float:
        """The largest logit error of a prompt and a cached step, as a fraction of the largest."""
        with self.open(out, machine) as runner:
            return refuse_other_logits(
                out / "model.pt2", runner, ids, expected, _TOLERANCE[self.precision]
            )


def _refuse_without_headers() -> None:
    """Refuses where PyTorch finds no CUDA: its wheels bring libraries, and not all of the headers.

    Raises:
        PlanError: there is no toolkit, or one without headers.
    """
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    if home is None or not (Path(home) / "include" / "cuda_runtime.h").is_file():
        raise PlanError(
            "export: aoti",
            "compiles against CUDA's headers, and "
            + (f"{home} has none" if home else "PyTorch finds no CUDA toolkit"),
            f"install the toolkit of CUDA {torch.version.cuda}, and set CUDA_HOME to its directory",
        )


def _read_bytes(model: Any) -> int:
    """The weight bytes that a decoding step reads: all but the embedding's, unless tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    total = sum(int(one.nbytes) for one in model.parameters())
    return total if tied else total - int(embedding.weight.nbytes)


def _held(model: Any) -> list[dict[str, Any]]:
    """Which pattern each linear layer's weight holds, as `patterns` counts it."""
    from torch import nn

    from prune_export.sparsity.patterns import counted

    return [
        asdict(counted(name, module.weight.detach().cpu().t().ne(0).numpy()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _sentence(eligible: int, done: Mapping[str, str], timings: Sequence[Any]) -> str:
    if not eligible:
        return "sparse kernels: none; no weight holds 2 of 4"
    if done:
        used = " and ".join(sorted(set(done.values())))
        return f"sparse kernels: {len(done)} of {eligible} layers run {used}"
    faults = sorted({f"{one.kernel}: {one.reason}" for one in timings if one.reason})
    why = f" ({'; '.join(faults)})" if faults else ""
    return f"sparse kernels: none is faster than dense here, no speedup{why}"
