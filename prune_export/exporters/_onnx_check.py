"""Runs a fresh graph once and compares it with PyTorch, so that a broken one never leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from prune_export.errors import StageError
from prune_export.exporters._onnx_trace import weightless
from prune_export.exporters._onnx_weights import Source
from prune_export.exporters._ort import OrtRunner
from prune_export.machine import Machine

TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""Largest logit error allowed, as a fraction of the largest logit."""

PROMPT: Final = 5


def reference_logits(
    config: Any, source: Source, ids: np.ndarray, dtype: torch.dtype
) -> np.ndarray:
    """PyTorch's logits float32 `[batch, length, vocab]`, one module's weights in memory at a time.

    The weights are rounded to `dtype`, the computation is float32.
    """
    model = weightless(config, torch.float32)
    model.config._experts_implementation = "eager"
    for path, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            _stream(path, module, lambda name: source.read(name).to(dtype).float())
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits


def _stream(path: str, module: nn.Module, read: Callable[[str], torch.Tensor]) -> None:
    empty = dict(module._parameters)

    def load(*_: Any) -> None:
        for name, parameter in empty.items():
            if parameter is not None:
                values = read(f"{path}.{name}")
                module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def free(*_: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(load)
    module.register_forward_hook(free)


def compare(
    graph: Path, config: Any, source: Source, dtype: torch.dtype, machine: Machine, *, prepack: bool
) -> float:
    """The largest logit error of a prompt and of one cached step, as a fraction of the largest.

    Raises:
        StageError: the graph does not load, or computes something else than PyTorch.
    """
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT + 1))
    expected = reference_logits(config, source, ids, dtype)
    with OrtRunner(graph, machine, prepack=prepack) as runner:
        prompt, _ = runner.step(ids[:, :PROMPT])
        step, _ = runner.step(ids[:, PROMPT:])
    scale = float(np.abs(expected).max())
    found = (
        ("the prompt", prompt, expected[:, PROMPT - prompt.shape[1] : PROMPT]),
        ("a cached step", step, expected[:, PROMPT:]),
    )
    worst = 0.0
    for what, got, wanted in found:
        error = float(np.abs(got - wanted).max()) / scale
        if not error <= TOLERANCE[dtype]:
            raise StageError(
                f"{graph}  {what}",
                f"logits differ from PyTorch's by {error:.2g} of the largest one, "
                f"expected at most {TOLERANCE[dtype]:g}",
                "this is a bug of the exporter or the runtime: report it with the model's config",
            )
        worst = max(worst, error)
    return worst
