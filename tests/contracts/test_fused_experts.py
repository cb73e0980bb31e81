"""Families whose experts are one tensor on disk: all but the experts is cut, and exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prune_export import registry
from prune_export.checkpoint import Checkpoint
from prune_export.surgery import rewrite
from tests.contracts.made import plain_view, view_for
from tests.contracts.test_width_methods import loaded, logits, silenced

FUSED = ("gpt_oss", "granitemoe", "granitemoeshared")


@pytest.mark.parametrize("model_type", FUSED)
def test_heads_that_are_cut_are_as_if_silenced(
    model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    method = registry.find("methods", "structured_magnitude")(heads=0.5, compensate=False)
    decision = method.decide(plain_view(checkpoint, tmp_path / "scratch"))
    rewrite(checkpoint, checkpoint.arch(), decision.edits, tmp_path / "cut", ram_bytes=1 << 30)
    expected = logits(silenced(checkpoint, decision.log["removed"], tmp_path / "silenced"))
    assert (expected - logits(loaded(checkpoint.path))).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded(tmp_path / "cut")), expected, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", FUSED)
def test_attention_that_is_named_becomes_sparse_and_experts_stay(
    model_type: str, tiny: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = tiny(model_type)
    method = registry.find("methods", "wanda")(sparsity=0.5, include=("q", "k", "v", "o"))
    decision = method.decide(view_for(method, checkpoint, tmp_path / "scratch"))
    after = rewrite(
        checkpoint, checkpoint.arch(), decision.edits, tmp_path / "out", ram_bytes=1 << 30
    )
    for tensor in checkpoint.arch().stored():
        if tensor.role in ("q", "k", "v", "o"):
            assert float((after.read(tensor.name) == 0).float().mean()) == 0.5
        else:
            assert torch.equal(after.read(tensor.name), checkpoint.read(tensor.name))
