"""TensorRT engines on a GPU: they compute what PyTorch does, with the cache and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_export.contracts import Work
from prune_export.errors import PlanError
from prune_export.exporters.tensorrt import Tensorrt
from prune_export.exporters.tensorrt.binding import installed
from prune_export.exporters.tensorrt.profiles import Span
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify.pytorch import PyTorch

FLAVORS: tuple[Any, ...] = ("tensorrt", "rtx")
TOLERANCE = {"fp32": 1e-2, "fp16": 5e-2, "bf16": 2e-1, "fp8": 5e-1, "int8": 5e-1}
"""Of the largest logit; random models magnify what 8 bits round, and fp32 computes in TF32."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("precision", sorted(TOLERANCE))
def test_an_engine_computes_what_pytorch_does(
    flavor: Any, precision: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    if not installed(flavor):
        pytest.skip(f"the library of {flavor} is not installed")
    machine = Machine.detect(device="cuda")
    entry = Tensorrt(
        flavor=flavor, precision=precision, logits="all", sparse=True,
        batch=Span(1, 2), prompt=Span(8, 16), context=Span(16, 32),
    )  # fmt: skip
    try:
        entry.check(None, machine)  # type: ignore[arg-type]  # no rule asks for the shapes
    except PlanError as error:
        pytest.skip(str(error))
    made = entry.export(tiny_llama, tmp_path / "out", Work(machine, Silent(), tmp_path))
    assert made.sparsity["proven"] is False
    if flavor == "tensorrt":
        assert made.sparsity["layers"] > 0
        assert (tmp_path / "out" / "layers.json").is_file()
    ids = np.random.default_rng(0).integers(0, 250, (2, 20))
    with PyTorch().open(tiny_llama, machine) as reference:
        wanted = reference.step(ids)[0]
    with entry.open(tmp_path / "out", machine) as runner:
        for _ in range(2):
            runner.reset()
            pieces = ((0, 9), (9, 10), (10, 11), (11, 20))
            got = np.concatenate([runner.step(ids[:, a:b])[0] for a, b in pieces], axis=1)
            error = np.abs(got - wanted).max() / np.abs(wanted).max()
            assert error < TOLERANCE[precision]
