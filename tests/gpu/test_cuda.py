"""What needs a CUDA device: the same numbers as on the CPU, within its precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    CalibrationContext,
    TokenSet,
    gather,
)
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.verify import Engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def tokens() -> TokenSet:
    ids = torch.randint(2, 250, (16, 64), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "cuda-test")


def test_statistics_equal_the_cpus(tiny_llama: Path, tokens: TokenSet) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    wanted = (AngularDistance(), BlockInfluence())
    on_cpu = gather(checkpoint, wanted, CalibrationContext(tokens, Machine.detect(device="cpu")))
    on_gpu = gather(checkpoint, wanted, CalibrationContext(tokens, Machine.detect(device="cuda")))
    for statistic in wanted:
        torch.testing.assert_close(on_gpu[statistic], on_cpu[statistic], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_lora_heals_as_on_the_cpu(
    compute_dtype: Any, tiny_llama: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    healer = Lora(
        rank=4,
        steps=4,
        batch=4,
        micro_batch=2,
        learning_rate=5e-3,
        dropout=0.0,
        compute_dtype=compute_dtype,
    )
    losses = []
    for device in ("cpu", "cuda"):
        work = Work(Machine.detect(device=device), Silent(), tmp_path / f"scratch-{device}")
        record = healer.heal(tiny_llama, tokens, tmp_path / device, work)
        losses.append([row[1] for row in record.log["loss"]])
    off = 1e-3 if compute_dtype == "float32" else 1e-2
    np.testing.assert_allclose(losses[1], losses[0], rtol=off)


def test_qlora_heals_and_reloads(tiny_llama: Path, tokens: TokenSet, tmp_path: Path) -> None:
    work = Work(Machine.detect(device="cuda"), Silent(), tmp_path / "scratch")
    healer = Qlora(rank=4, steps=20, batch=4, learning_rate=5e-3, targets="all")
    record = healer.heal(tiny_llama, tokens, tmp_path / "out", work)
    losses = [row[1] for row in record.log["loss"]]
    assert losses[-1] < losses[0]
    Checkpoint.open(tmp_path / "out").arch()


def test_the_pytorch_runner_decodes_as_the_cpus(tiny_llama: Path) -> None:
    ids = np.arange(2, 34, dtype=np.int64)[None]
    found = []
    for device in ("cpu", "cuda"):
        with Engine.pytorch(tiny_llama).open(Machine.detect(device=device)) as runner:
            first, _ = runner.step(ids[:, :-1])
            last, seconds = runner.step(ids[:, -1:])
            assert seconds > 0
            found.append(np.concatenate([first[:, -1], last[:, -1]]))
    np.testing.assert_allclose(found[0], found[1], atol=2e-2)
