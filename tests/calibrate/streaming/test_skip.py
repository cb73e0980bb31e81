"""A part of a block is skipped whole, also where an MLP and experts stand beside each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.calibrate.streaming.skip import skipped
from prune_export.checkpoint import Checkpoint
from tests.arch.tiny_models import PROMPT
from tests.saved_models import maker

MIXTURE = {
    "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return maker(tmp_path_factory.mktemp)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("gemma4_text", MIXTURE), ("gpt_oss", {}), ("llama4_text", {}), ("granitemoe", {})],
)
@torch.inference_mode()
def test_a_skipped_part_is_one_whose_outputs_are_zero(
    saved: Callable[..., Path], model_type: str, changes: dict[str, object], part: str
) -> None:
    checkpoint = Checkpoint.open(saved(model_type, **changes))
    arch = checkpoint.arch()
    layerwise = LayerwiseModel(checkpoint, arch, dtype=torch.float32, device="cpu")
    layerwise.look_up(PROMPT)
    calls, states = layerwise.calls(PROMPT), layerwise.enter(PROMPT)
    own = {"attention": ("o",), "mlp": ("down", "experts.down", "shared.down")}[part]
    for layer in (0, 1):
        layerwise.load(layer, layerwise.read(arch.block(layer)))
        whole = layerwise.run(layer, states, calls[layer])
        with skipped(layerwise, layer, (part,)):
            found = layerwise.run(layer, states, calls[layer])
        tensors = layerwise.read(arch.block(layer))
        silent = {
            layerwise.name_in_memory(tensor)
            for tensor in arch.block(layer)
            if tensor.role.removesuffix(".bias") in own
        }
        assert silent
        for name in silent:
            tensors[name] = torch.zeros_like(tensors[name])
        layerwise.load(layer, tensors)
        expected = layerwise.run(layer, states, calls[layer])
        layerwise.free(layer)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert (found - whole).abs().max() > 1e-3
