"""Linear layers with 2:4 weights, stored compressed and multiplied on sparse tensor cores.

PyTorch has two kernels, CUTLASS's and cuSPARSELt's. Which is faster than dense, if any, depends on
the GPU, type and shape, and on some GPUs one faults. So each is timed in a process of its own
(`probe`) at the model's shapes, and only what wins is used.

Source: torch.sparse.semi_structured, for operators and the sizes that they take.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.nn.functional import linear, pad

Kernel = Literal["dense", "cutlass", "cusparselt"]
KERNELS: Final[tuple[Kernel, ...]] = ("cutlass", "cusparselt")
MARGIN: Final = 1.02
"""A kernel that is not faster than dense by this much is not used."""

_MULTIPLES: Final[Mapping[str, tuple[int, int]]] = {"cutlass": (32, 64), "cusparselt": (16, 16)}
"""What outputs and inputs must be multiples of, in fp16 and bf16."""

_TOKENS: Final = 8  # what the number of tokens must be a multiple of; more are filled with zeros
_PROBE_SECONDS: Final = 300


@dataclass(frozen=True)
class Timing:
    """The time of a kernel at one shape in seconds, or None and the reason why it does not run."""

    kernel: Kernel
    outputs: int
    inputs: int
    seconds: float | None
    reason: str = ""


class SparseLinear(nn.Module):
    """A linear layer with a 2:4 `weight` `[outputs, inputs]`: `x @ weight.T + bias`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, kernel: Kernel) -> None:
        super().__init__()
        self.outputs, self.kernel = int(weight.shape[0]), kernel
        packed, meta = pack(weight, kernel)
        self.register_buffer("packed", packed)
        self.register_buffer("meta", meta)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        tokens = flat.shape[0]
        columns = pad(flat, (0, 0, 0, -tokens % _TOKENS)).t()
        if self.kernel == "cutlass":
            found = torch.ops.aten._sparse_semi_structured_mm(self.packed, self.meta, columns)
        else:
            found = torch.ops.aten._cslt_sparse_mm(self.packed, columns)
        y = found.t()[:tokens].reshape(*x.shape[:-1], self.outputs)
        biased: torch.Tensor = y if self.bias is None else y + self.bias
        return biased


def pack(weight: torch.Tensor, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packs a 2:4 weight as a kernel wants it: the kept half, and its places."""
    if kernel == "cusparselt":
        return torch._cslt_compress(weight.contiguous()), None
    from torch.sparse import _semi_structured_conversions as conversions

    split: Any = conversions.sparse_semi_structured_from_dense_cutlass
    packed, meta = split(weight.contiguous())
    return packed, meta


def holds_two_of_four(weight: torch.Tensor) -> bool:
    """Whether a weight `[outputs, inputs]` is 2:4: at most two non-zeros in each four inputs."""
    if weight.dim() != 2 or weight.shape[1] % 4:
        return False
    groups = (weight != 0).view(len(weight), -1, 4)
    return int(groups.sum(dim=-1, dtype=torch.int8).max()) <= 2


def candidates(model: nn.Module, head: nn.Module | None) -> Iterator[tuple[str, nn.Linear]]:
    """Finds the linear layers with a 2:4 weight, by name; never the LM head."""
    for name, module in model.named_modules():
        inner = isinstance(module, nn.Linear) and module is not head
        if inner and holds_two_of_four(module.weight):
            yield name, module


def fits(kernel: Kernel, outputs: int, inputs: int) -> bool:
    """Whether a kernel supports a weight of this size."""
    rows, columns = _MULTIPLES[kernel]
    return outputs % rows == 0 and inputs % columns == 0


def probed(shapes: Iterable[tuple[int, int]], dtype: str, tokens: int, device: str) -> list[Timing]:
    """Times each kernel at each shape `(outputs, inputs)`, in processes that may crash."""
    shapes = sorted(set(shapes))
    found: list[Timing] = []
    for kernel in ("dense", *KERNELS):
        asked = [s for s in shapes if kernel == "dense" or fits(kernel, *s)]
        found += _probe(kernel, asked, dtype, tokens, device)
    return found


def chosen(timings: Iterable[Timing]) -> dict[tuple[int, int], tuple[Kernel, float]]:
    """Chooses for each shape the kernel that beats dense by the margin, and gives the speedup."""
    table = {(one.outputs, one.inputs, one.kernel): one.seconds for one in timings}
    best: dict[tuple[int, int], tuple[Kernel, float]] = {}
    for outputs, inputs, _ in table:
        dense = table.get((outputs, inputs, "dense"))
        for kernel in KERNELS:
            seconds = table.get((outputs, inputs, kernel))
            if not dense or not seconds:
                continue
            gain = dense / seconds
            if gain >= max(MARGIN, best.get((outputs, inputs), ("", 0.0))[1]):
                best[outputs, inputs] = (kernel, gain)
    return best


def replaced(
    model: nn.Module, layers: Mapping[str, nn.Linear], best: Mapping[tuple[int, int], Any]
) -> dict[str, Kernel]:
    """Replaces the layers whose shape has a faster kernel by sparse ones; gives name and kernel."""
    done: dict[str, Kernel] = {}
    for name, module in layers.items():
        winner = best.get((module.out_features, module.in_features))
        if winner:
            parent, _, leaf = name.rpartition(".")
            sparse = SparseLinear(module.weight.detach(), module.bias, winner[0])
            setattr(model.get_submodule(parent), leaf, sparse)
            done[name] = winner[0]
    return done


def call_by_dispatcher() -> None:
    """Makes the compiler call CUTLASS's operator through the dispatcher, as it does cuSPARSELt's.

    Else it calls a C function that PyTorch does not have (2.13), and g++ fails. Other releases of
    PyTorch may know the operator by another name: then they decide.
    """
    from torch._inductor.kernel import mm

    if known := getattr(mm, "aten__sparse_semi_structured_mm", None):
        known.use_fallback_kernel = True


def product(weight: torch.Tensor, kernel: Kernel) -> Any:
    """Makes a function from `x` `[tokens, inputs]` to `x @ weight.T` that runs a kernel."""
    return SparseLinear(weight, None, kernel) if kernel != "dense" else _Dense(weight)


class _Dense(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)


def _probe(
    kernel: Kernel, shapes: Sequence[tuple[int, int]], dtype: str, tokens: int, device: str
) -> list[Timing]:
    if not shapes:
        return []
    asked = {"kernel": kernel, "shapes": list(shapes), "dtype": dtype, "tokens": tokens,
             "device": device}  # fmt: skip
    command = [sys.executable, "-P", "-m", "prune_export.exporters.aoti.probe"]
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=False,
            timeout=_PROBE_SECONDS, env=_environment(),
        )  # fmt: skip
        lines, last = done.stdout.splitlines(), done.stderr.strip().splitlines()[-1:]
        why = last[0] if last else f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
        why = f"took longer than {_PROBE_SECONDS} s"
    found = [Timing(**json.loads(line)) for line in lines]
    missing = list(shapes)[len(found) :]
    return found + [Timing(kernel, *shape, None, why) for shape in missing]


def _environment() -> dict[str, str]:
    import os
    from pathlib import Path

    import prune_export

    package = str(Path(prune_export.__file__).parents[1])
    path = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
