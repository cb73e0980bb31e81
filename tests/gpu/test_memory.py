"""How much of a real GPU is free."""

from __future__ import annotations

import pytest
import torch

from prune_export.machine import Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_memory_of_the_gpu_is_what_is_free() -> None:
    before = Machine.detect().gpu_bytes
    assert 0 < before <= torch.cuda.get_device_properties(0).total_memory
    held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    assert before - Machine.detect().gpu_bytes > 0.9 * held.nbytes
    del held  # torch keeps the memory, which this process may use again
    assert abs(before - Machine.detect().gpu_bytes) < 1 << 28
