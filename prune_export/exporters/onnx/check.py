"""Compares the logits of a new graph with PyTorch's, before the export counts as done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from prune_export.exporters._shared.logit_check import PROMPT, refuse_other_logits
from prune_export.exporters._shared.ort_runner import OrtRunner
from prune_export.exporters.onnx.coding import decoded
from prune_export.exporters.onnx.merge import parts
from prune_export.exporters.onnx.replicate import Weight
from prune_export.exporters.onnx.trace import weightless
from prune_export.exporters.onnx.weights import Source
from prune_export.machine import Machine

TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest logit error allowed, as a fraction of the largest logit."""

INT8_TOLERANCE: Final = 5e-1
"""With weights as codes the runtime rounds activations to int8, which random models magnify."""


def reference_logits(
    config: Any, source: Source, ids: np.ndarray, dtype: torch.dtype, weights: Iterable[Weight] = ()
) -> np.ndarray:
    """Computes PyTorch's logits, float32 `[batch, length, vocab]`, loading one module at a time.

    The model is the whole one, also where the graph has only what `source` leaves of it. The
    weights are rounded to `dtype`, and those of `weights` that are stored as codes as they are
    stored; the computation is float32.
    """
    model = weightless(config, torch.float32)
    model.config._experts_implementation = "eager"
    stored = {
        part: weight
        for weight in weights
        if weight.coding is not None
        for part in parts(weight.parameter)
    }
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffer.copy_(source.read(f"{path}.{name}"))  # a router's correction
        if _has_own(module):
            rounded = {} if isinstance(module, nn.Embedding) else stored
            read = partial(_rounded, source=source, dtype=dtype, stored=rounded)
            _stream(path, module, read, when=_reader(model, path, module))
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


def _rounded(
    name: str, source: Source, dtype: torch.dtype, stored: Mapping[str, Weight]
) -> torch.Tensor:
    values = replace(source, trim=None).read(name).to(dtype).float()
    names = (name, *source.tied.get(name, ()))
    weight = next((stored[other] for other in names if other in stored), None)
    if weight is None or weight.coding is None:
        return values
    stacked = values if values.dim() == 3 else values.unsqueeze(0)
    for number, matrix in enumerate(stacked):  # in place: it is a copy already
        expert = number if values.dim() == 3 else None
        left = tuple(map(torch.from_numpy, np.ix_(*source.left(name, expert, matrix.shape))))
        turned = matrix[left].t() if weight.transposed else matrix[left]
        own = replace(weight, expert=expert)
        read = decoded(own, turned, source, name)
        matrix[left] = read.t() if weight.transposed else read
    return values


def _has_own(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _reader(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module whose `forward` reads the parameters of `module`: itself, or the one it is in.

    Mixers with states read the weight of a convolution, or of a projection of step sizes, and do
    not call it.
    """
    owner = model.get_submodule(path.rpartition(".")[0])
    by_owner = isinstance(module, _ConvNd) or (isinstance(module, nn.Linear) and _has_own(owner))
    return owner if by_owner else module


def _stream(
    path: str, module: nn.Module, read: Callable[[str], torch.Tensor], *, when: nn.Module
) -> None:
    """Reads the parameters of a module before the module `when` runs, and frees them after."""
    empty = dict(module._parameters)

    def load(*_: Any) -> None:
        for name, parameter in empty.items():
            if parameter is not None:
                values = read(f"{path}.{name}")
                module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def free(*_: Any) -> None:
        module._parameters.update(empty)

    when.register_forward_pre_hook(load)
    when.register_forward_hook(free)


def compare(
    graph: Path,
    config: Any,
    source: Source,
    dtype: torch.dtype,
    machine: Machine,
    *,
    weights: Iterable[Weight] = (),
    prepack: bool = True,
) -> float:
    """Gives the largest logit error of a prompt and a cached step, relative to the largest logit.

    Raises:
        StageError: the graph does not load, or computes something else than PyTorch.
    """
    weights = tuple(weights)
    coded = any(weight.coding is not None for weight in weights)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT + 1))
    expected = reference_logits(config, source, ids, dtype, weights)
    with OrtRunner(graph, machine, prepack=prepack, fuse=not coded) as runner:
        worst = refuse_other_logits(graph, runner, ids, expected, TOLERANCE[dtype])
    if coded:  # once more as it will be used, with the runtime's own rounding of activations
        with OrtRunner(graph, machine, prepack=prepack) as runner:
            worst = refuse_other_logits(graph, runner, ids, expected, INT8_TOLERANCE)
    return worst
