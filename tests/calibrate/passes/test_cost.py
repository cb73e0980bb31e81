"""Costs from shapes alone, for every family, with the head tied to the embedding and of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig

from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.calibrate import AngularDistance, pass_cost
from prune_export.machine import Machine
from prune_export.methods.depth.greedy_loss import GreedyLoss
from tests.arch.tiny_models import tiny_config

VARIANTS = [
    pytest.param(model_type, {**changes, "tie_word_embeddings": tied}, id=f"{model_type}-{name}")
    for model_type, table in sorted(tables().items())
    for tied in (True, False)
    for name, changes in {
        f"{kind}-{'tied' if tied else 'own'}": changes
        for kind, changes in {"plain": {}, **table.tiny.variants}.items()
    }.items()
]
MACHINE = Machine("cpu", 1 << 40, 0, 1)


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_costs_follow_from_the_tensors_of_the_blocks(
    model_type: str, changes: Mapping[str, Any]
) -> None:
    config = AutoConfig.for_model(model_type, **tiny_config(model_type, changes))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    arch = Arch.from_config(config.to_dict())
    blocks = sum(p.numel() for p in model.get_submodule(arch.table.blocks).parameters())
    head = model.get_output_embeddings()
    weights = head.weight.numel() + (0 if head.bias is None else head.bias.numel())
    assert arch.block_parameters() == blocks
    assert arch.head_parameters() in (head.weight.numel(), weights)

    attention = 2 * 32 * arch.sizes["residual"]
    found = pass_cost(arch, [AngularDistance()], 10, 32, MACHINE)
    assert found.flops == pytest.approx(10 * 32 * (2 * blocks + attention * arch.layers))

    (passes,) = GreedyLoss(remove=1).statistics(arch)
    assert 1 < passes.forwards < 20 + 20 * head.weight.numel() / blocks


def test_a_large_vocabulary_that_is_tied_does_not_count_against_the_blocks() -> None:
    """Gemma 3 270M: more of it is vocabulary than blocks, and the vocabulary is there once."""
    config = Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, tie_word_embeddings=True,
    )  # fmt: skip
    arch = Arch.from_config(config.to_dict())
    assert arch.parameters() == 268_098_176
    assert arch.block_parameters() == arch.parameters() - 262144 * 640 - 640
    (passes,) = GreedyLoss(remove=1).statistics(arch)
    cost = pass_cost(arch, [passes], 8, 256, MACHINE)
    # 18 candidates at most see all windows, through blocks and head.
    assert 0 < cost.flops < 18 * 8 * 256 * 2 * 1.2 * arch.parameters()
