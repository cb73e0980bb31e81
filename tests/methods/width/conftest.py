"""A tiny model cut by a width method, and what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.arch import Arch
from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.surgery import rewrite
from tests.arch.tiny_models import Tiny, random_model

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))

Cutter = Callable[..., tuple[Tiny, Any, Any]]


@pytest.fixture
def cut(tmp_path: Path) -> Cutter:
    """Makes a tiny model, cuts it and loads the result; also the decision's log."""

    def make(model_type: str, method: Any, **changes: Any) -> tuple[Tiny, Any, Any]:
        tiny = random_model(model_type, changes, tmp_path / "model")
        checkpoint = Checkpoint.open(tiny.path)
        context = CalibrationContext(TokenSet.of(IDS), MACHINE, tmp_path / "scratch")
        decision = method.decide(ModelView(tiny.arch, checkpoint, {}, context))
        out = tmp_path / "out"
        after = rewrite(checkpoint, tiny.arch, decision.edits, out, ram_bytes=1 << 30)
        predicted = method.predict(tiny.arch)
        assert {t.name: predicted.shape(t) for t in predicted.stored()} == {
            name: entry.shape for name, entry in after.entries.items()
        }
        return tiny, AutoModelForCausalLM.from_pretrained(out).eval(), decision.log

    return make


def arch_of(model_type: str, **changes: Any) -> Arch:
    from transformers import AutoConfig

    return Arch.from_config(AutoConfig.for_model(model_type, **changes).to_dict())


LLAMA = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
