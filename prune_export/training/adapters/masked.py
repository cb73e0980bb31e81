"""LoRA adapters under a mask, which keep zeros: W + M * (alpha / r) B A, M zero where W is.

The mask is part of the training, not of the merge alone, so what is trained is what is written. A
step forms the sum of one layer at a time: out * in * r operations however many tokens there are.
Beyond a plain adapter's it costs one product a layer, the gradient of the sum, of which B's and A's
are made; that gradient has to be formed before it can be masked.

Differs: dropout removes inputs of an adapter for all tokens of a micro-batch alike (columns of A,
as in Lin et al., "LoRA Dropout as a Sparsity Regularizer for Overfitting Control",
arXiv:2404.09610); for each token by itself it would take two more products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from prune_export.training.zeros import Packed


@dataclass(frozen=True)
class Base:
    """A layer's frozen matrix with zeros to keep, always seen as `[out, in]`.

    `zeros` is for a 4-bit one; a plain one is zero where it is zero.
    """

    layer: Any
    transposed: bool
    zeros: Packed | None = None

    def values(self) -> torch.Tensor:
        """The matrix to compute with, dequantized where it is 4-bit; else not a copy."""
        weight = self.layer.weight
        if self.zeros is None:
            plain: torch.Tensor = weight.data
            return plain.T if self.transposed else plain
        import bitsandbytes.functional as bnb

        found: torch.Tensor = bnb.dequantize_4bit(weight.data, weight.quant_state)
        return found if self.layer.compute_dtype is None else found.to(self.layer.compute_dtype)

    def zero(self) -> torch.Tensor:
        """Bools, true where the matrix is to stay zero."""
        return self.values() == 0 if self.zeros is None else self.zeros.zero()

    def plus(self, delta: torch.Tensor) -> torch.Tensor:
        """The matrix with `delta` added (and overwritten) where it is not to stay zero."""
        values = self.values()
        return delta.add_(values).masked_fill_(self.zero(), 0).to(values.dtype)


class _MaskedLinear(torch.autograd.Function):
    """`x` `[..., in]` times W + M * scaling * B A; gradients for `x`, A `[r, in]`, B `[out, r]`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, base: Base
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.scaling, ctx.base = scaling, base
        bias = base.layer.bias
        return functional.linear(
            x, _sum(a, b, scaling, base), None if bias is None else bias.to(x.dtype)
        )

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        grad = outer[0].reshape(-1, outer[0].shape[-1])  # [tokens, out]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ _sum(a, b, ctx.scaling, ctx.base)).view_as(x)
        of_sum = (grad.T @ x.reshape(-1, x.shape[-1])).float()  # [out, in]
        of_sum.mul_(ctx.scaling).masked_fill_(ctx.base.zero(), 0)
        return of_x, b.T @ of_sum, of_sum @ a.T, None, None


def _sum(a: torch.Tensor, b: torch.Tensor, scaling: float, base: Base) -> torch.Tensor:
    return base.plus((b @ a).mul_(scaling))


def mask(module: Any, adapter: str, base: Base) -> None:
    """Makes one of peft's adapted layers compute with the masked sum."""
    module.forward = partial(_forward, module, adapter, base)


def _forward(module: Any, adapter: str, base: Base, x: torch.Tensor) -> torch.Tensor:
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
    if dropout and module.training:
        a = a * functional.dropout(torch.ones_like(a[:1]), dropout)
    values = base.layer.weight.dtype if base.zeros is None else base.layer.compute_dtype
    inputs = x if values is None else x.to(values)
    out: torch.Tensor = _MaskedLinear.apply(  # type: ignore[no-untyped-call]
        inputs, a, b, module.scaling[adapter], base
    )
    return out.to(x.dtype)
