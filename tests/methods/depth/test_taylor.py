"""Taylor scores of blocks against plain autograd on the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.methods.depth.taylor import Taylor
from tests.arch.tiny_models import random_model

MACHINE = Machine("cpu", 8 << 30, 0, 1)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_scores_equal_autograd_and_the_ends_are_protected(model_type: str, tmp_path: Path) -> None:
    tiny = random_model(model_type, {}, tmp_path / "model")
    ids = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))
    view = ModelView(
        tiny.arch,
        Checkpoint.open(tiny.path),
        {},
        CalibrationContext(TokenSet.of(ids), MACHINE, tmp_path),
    )
    found = Taylor(remove=2, protect_first=1, protect_last=1).decide(view).log

    model = tiny.model.float()
    for window in ids:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:]).backward()
    blocks = model.get_submodule(tiny.arch.table.blocks)
    scores = [
        sum(
            float((p * p.grad).detach().abs().sum())
            for p in block.parameters()
            if p.grad is not None
        )
        for block in blocks
    ]
    assert found["block_scores"][1:-1] == pytest.approx(scores[1:-1], rel=1e-3)
    assert found["block_scores"][0] is found["block_scores"][-1] is None
    order = sorted(range(1, len(scores) - 1), key=scores.__getitem__)
    assert found["dropped"] == sorted(order[:2])
