"""Adapters computed in the model's dtype: the same sums and gradients, float32 parameters."""

from __future__ import annotations

import peft
import pytest
import torch

from prune_export.training.adapters.low_rank import compute_in_own_dtype

SCALING = 0.5


def adapted(dtype: torch.dtype) -> peft.tuners.lora.Linear:
    """One of peft's layers over a frozen one of `dtype`, with adapters that are not zero."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5).to(dtype)).requires_grad_(False)
    config = peft.LoraConfig(r=2, lora_alpha=2 * SCALING, target_modules=["0"])
    layer = peft.get_peft_model(base, config).get_submodule("base_model.model.0")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def passed(layer: peft.tuners.lora.Linear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What comes out of a layer, and the gradients of a sum of it with given weights."""
    torch.manual_seed(1)
    x = torch.randn(3, 4, 6, dtype=dtype, requires_grad=True)
    out = layer(x)
    (out * torch.randn(3, 4, 5).to(dtype)).sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, "a": a.grad, "b": b.grad}


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_outputs_and_gradients_are_those_of_peft(dtype: torch.dtype, near: float) -> None:
    expected, layer = passed(adapted(dtype), dtype), adapted(dtype)
    compute_in_own_dtype(layer, "default")
    found = passed(layer, dtype)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        scale = float(value.float().abs().max())
        torch.testing.assert_close(found[name], value, atol=near * scale, rtol=0)


def test_no_float32_copy_of_the_inputs_is_kept() -> None:
    layer, kept = adapted(torch.bfloat16), list[torch.Tensor]()
    compute_in_own_dtype(layer, "default")

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 4, 6, dtype=torch.bfloat16, requires_grad=True))
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
