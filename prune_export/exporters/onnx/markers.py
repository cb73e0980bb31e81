"""Replaces transformers' attention and experts by marker operators while a model is traced.

Both become markers in the graph, in whose place `replicate` writes what reads and writes the
cache, and one expert after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

from prune_export.errors import PlanError

DOMAIN: Final = "prune_export"
NAME: Final = "prune_export_onnx"
"""The name of our attention, mask and expert functions in transformers' registries."""
OTHER: Final = "export this model with another exporter"


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Emits attention over past and new tokens as one marker; with a soft cap, in parts.

    Opset 23 leaves it to the runtime whether the cap comes before or after the mask, and these
    models were trained with it before, so a cap is spelled out.
    """
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise PlanError("onnx", f"attention with `{name}` is not supported", OTHER)
    heads, kv_heads = query.shape[1], key.shape[1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    batch, _, new, width = query.shape
    total = attention_mask.shape[-1]
    shapes = [(batch, kv_heads, total, t.shape[-1]) for t in (key, value)]
    attrs = {"block": module.layer_idx}
    if softcap is None:
        result, _, _ = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::Attention", [query, key, value, attention_mask], attrs | {"scale": scale},
            dtypes=[query.dtype] * 3, version=1,
            shapes=[(batch, heads, new, value.shape[-1]), *shapes],
        )  # fmt: skip
        return result.transpose(1, 2).contiguous(), None
    keys, values = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Append", [key, value], attrs,
        dtypes=[key.dtype] * 2, shapes=shapes, version=1,
    )  # fmt: skip
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, new, width)
    scores = torch.matmul(grouped * scale, keys.unsqueeze(2).transpose(3, 4))
    scores = torch.tanh(scores / softcap) * softcap + attention_mask.unsqueeze(1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    result = torch.matmul(weights, values.unsqueeze(2)).reshape(batch, heads, new, -1)
    return result.transpose(1, 2).contiguous(), None


def _experts(
    module: Any, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Traces one expert between markers; `replicate` repeats it for the others."""
    if (
        module.has_bias
        or module.is_transposed
        or (not module.is_concatenated or module.has_post_expert_norm)
    ):
        raise PlanError("onnx", "experts of this form are not supported", OTHER)
    rows = torch.onnx.ops.symbolic(
        f"{DOMAIN}::ExpertInput", [hidden, index, weight], {"experts": module.num_experts},
        dtype=hidden.dtype, shape=hidden.shape, version=1,
    )  # fmt: skip
    if module.has_gate:
        inner = module._apply_gate(nn.functional.linear(rows, module.gate_up_proj))
    else:
        inner = module.act_fn(nn.functional.linear(rows, module.up_proj))
    result = nn.functional.linear(inner, module.down_proj)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::ExpertOutput", [result], {}, dtype=result.dtype, shape=result.shape, version=1
    )


@contextmanager
def registered() -> Iterator[None]:
    """Makes transformers use the markers inside a `with`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    entries: list[tuple[Any, Callable[..., Any]]] = [
        (ALL_ATTENTION_FUNCTIONS, _attention),
        (ALL_MASK_ATTENTION_FUNCTIONS, eager_mask),
        (ALL_EXPERTS_FUNCTIONS, _experts),
    ]
    for registry, function in entries:
        registry.register(NAME, function)
    try:
        yield
    finally:
        for registry, _ in entries:
            registry._global_mapping.pop(NAME, None)
