"""Tiny random models of every family, with what transformers itself computes in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prune_export.arch import Arch
from prune_export.arch.table import table_for
from prune_export.calibrate import TokenSet
from prune_export.calibrate.passes import sequential
from prune_export.calibrate.streaming import driver
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine

MACHINE = Machine("cpu", 8 * 1024**3, 0, 1)


@dataclass(frozen=True)
class Twin:
    """A tiny model, its checkpoint, and brute force on it."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    arch: Arch

    def points(self, ids: torch.Tensor) -> torch.Tensor:
        """`[layers + 1, samples, length, residual]`: residual states, by hooks on the blocks."""
        blocks = self.model.get_submodule(self.arch.table.blocks)
        caught: list[torch.Tensor] = []

        def keep(_module: object, inputs: Any, named: Any, output: Any) -> None:
            caught.append(inputs[0] if inputs else named["hidden_states"])
            if len(caught) == len(blocks):
                caught.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
        with torch.no_grad():
            self.model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.stack(caught)

    def loss(self, ids: torch.Tensor, without: Iterable[int] = ()) -> float:
        """The mean next-token loss of the model that skips some blocks."""

        def unchanged(_module: object, inputs: Any, named: Any, output: Any) -> Any:
            states = inputs[0] if inputs else named["hidden_states"]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        blocks = self.model.get_submodule(self.arch.table.blocks)
        hooks = [
            blocks[layer].register_forward_hook(unchanged, with_kwargs=True) for layer in without
        ]
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits[:, :-1].double()
        for hook in hooks:
            hook.remove()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture
def machine() -> Machine:
    return MACHINE


@pytest.fixture
def tokens() -> TokenSet:
    """Five windows of twelve tokens that every tiny model knows."""
    random = torch.Generator().manual_seed(7)
    return TokenSet.of(torch.randint(2, 64, (5, 12), generator=random))


@pytest.fixture
def twin(tmp_path: Path) -> Callable[..., Twin]:
    """Makes a tiny model with all parameters random, so that none is a zero that hides."""

    def make(model_type: str, **changes: Any) -> Twin:
        torch.manual_seed(0)
        settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        settings |= {**table_for(model_type).tiny.config, **changes}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.6 if parameter.dim() > 1 else 0.3)
                if parameter.dim() == 1 and name.endswith("weight") and "gemma" not in model_type:
                    parameter.add_(1.0)
        model.save_pretrained(tmp_path / model_type)
        checkpoint = Checkpoint.open(tmp_path / model_type)
        return Twin(model.eval(), checkpoint, checkpoint.arch())

    return make


@pytest.fixture
def small_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows at once, so that five make a ragged last batch."""
    monkeypatch.setattr(driver, "BATCH_TOKENS", {"cpu": 24})


@pytest.fixture
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a sweep goes, given by `indirect`: `repeated` is for want of room to park in."""
    if request.param == "repeated":
        monkeypatch.setattr(sequential, "suspended_bytes", lambda *_: 1 << 60)
    return str(request.param)
