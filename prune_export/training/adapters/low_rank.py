"""LoRA adapters whose products are made in the dtype that the model computes in.

peft computes an adapter in the dtype that it is held in, float32: of each layer's input there is a
float32 copy, kept for the gradient, and the products run at float32's rate, which on a CPU with
bfloat16 products is a quarter of theirs. Here A and B are rounded for the product only, as in
autocast; what is trained, and merged, stays float32.

Measured, SmolLM2-135M without 6 blocks, rank 16 on all linear weights, two windows of 512, one
thread of an EPYC with AVX512-BF16: see ADR 0025.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


class _Added(torch.autograd.Function):
    """`result` `[..., out]` + scaling * B A x, of `x` `[..., in]`, A `[r, in]` and B `[out, r]`."""

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        own_a, own_b = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ own_a.T  # [tokens, r]
        ctx.save_for_backward(x, inner, own_a, own_b)
        ctx.scaling = scaling
        flat = result.reshape(-1, result.shape[-1])
        return torch.addmm(flat, inner, own_b.T, alpha=scaling).view_as(result)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        grad = outer[0].reshape(-1, outer[0].shape[-1])  # [tokens, out]
        of_inner = (grad @ b).mul_(ctx.scaling)
        of_a = of_inner.T @ x.reshape(-1, x.shape[-1])
        of_b = (grad.T @ inner).float().mul_(ctx.scaling)
        of_x = (of_inner @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return outer[0], of_x, of_a.float(), of_b, None


def compute_in_own_dtype(module: Any, adapter: str) -> None:
    """Makes one of peft's adapted layers compute its adapter in the dtype of the layer's output."""
    module.forward = partial(_forward, module, adapter)


def _forward(module: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.base_layer(x)
    inputs = module.lora_dropout[adapter](x).to(result.dtype)
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return _Added.apply(result, inputs, a, b, module.scaling[adapter])  # type: ignore[no-untyped-call, no-any-return]
