"""In the order of the reference codes, sparse methods are these to the mask."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.methods.sparse.gblm import Gblm
from prune_export.methods.sparse.sparsegpt import SparseGpt
from prune_export.methods.sparse.wanda import Wanda
from prune_export.sparsity.nm import Nm
from tests.arch.tiny_models import random_model

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import _sparse_released

IDS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(1))
AMOUNTS: dict[str, Any] = {"50%": {"sparsity": 0.5}, "4:8": {"nm": Nm(4, 8)}}


@pytest.mark.parametrize("pattern", AMOUNTS)
@pytest.mark.parametrize("method", [Wanda, Gblm, SparseGpt])
def test_zeros_are_where_the_released_code_puts_them(
    method: Any, pattern: str, tmp_path: Path
) -> None:
    tiny = random_model("llama", {}, tmp_path / "model")
    context = CalibrationContext(
        TokenSet.of(IDS), Machine("cpu", 8 << 30, 0, 1), tmp_path / "scratch"
    )
    view = ModelView(tiny.arch, Checkpoint.open(tiny.path), {}, context)
    decision = method(order="block", **AMOUNTS[pattern]).decide(view)
    options = argparse.Namespace(method=method.__name__.lower(), pattern=pattern)
    _sparse_released.prune(options, tiny.model.float(), IDS, None)
    different = weights = 0
    for edit in decision.edits:
        theirs = tiny.model.get_parameter(edit.tensor)
        different += int(((edit.value() == 0) != (theirs == 0)).sum())
        weights += theirs.numel()
    # Sums in another order decide a few equal scores otherwise.
    assert different <= weights // 1000, f"{different} of {weights}"
