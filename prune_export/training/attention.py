"""Attention by plain bfloat16 products, where torch's fused kernel is slower: training on a CPU.

torch's kernel for CPUs never holds the scores, and its backward pass computes them anew. Two matrix
products and a softmax, on scores that are held in bfloat16, take a third of its time: 19 ms against
55 for 9 heads of 64 over two windows of 512, forward and backward, on one thread of an EPYC with
AVX512-BF16. Scores are rounded to bfloat16; sums are float32 in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LONGEST: Final = 1024
"""Tokens of a window up to which scores are held; beyond, they take more than they save."""


def makes_scores(device: str, item: int, length: int) -> bool:
    """Whether a training's attention is made of products: bfloat16 on a CPU, short windows."""
    return device == "cpu" and item == 2 and length <= LONGEST


def score_bytes(heads: int, length: int) -> int:
    """Bytes that a token's scores, of which the softmax is kept, take in a block."""
    return 2 * heads * length


class PlainAttention(TorchFunctionMode):
    """Inside of this `with`, self-attention that is asked of torch's kernel is made of products.

    What it does not know (dropout, masks of a kind, lengths that differ) goes to the kernel.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            if torch.is_autocast_enabled("cpu"):
                # As it would before the kernel.
                args = [_narrow(one) for one in args]
                given = {name: _narrow(one) for name, one in given.items()}
            if _is_known(*args, **given):
                return _attended(*args, **given)
        return func(*args, **given)


def _narrow(value: Any) -> Any:
    """A float32 tensor in autocast's dtype, anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
        return value.to(torch.get_autocast_dtype("cpu"))
    return value


def _is_known(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    del value, scale, enable_gqa
    return (
        query.dtype == torch.bfloat16
        and query.dim() == 4
        and query.shape[2] == key.shape[2] <= LONGEST
        and query.shape[1] % key.shape[1] == 0
        and attn_mask is None
        and is_causal
        and not dropout_p
    )


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Causal attention of `[windows, heads, length, head]`; heads may share keys and values."""
    del attn_mask, dropout_p, is_causal, enable_gqa
    shared, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (states.repeat_interleave(shared, 1) for states in (key, value))
    hidden = query.new_full((length, length), -torch.inf).triu_(1)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    scores = ((query * factor) @ key.transpose(2, 3)).add_(hidden)
    return torch.softmax(scores, dim=-1) @ value
