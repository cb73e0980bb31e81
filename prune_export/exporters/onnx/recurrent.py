"""Replaces transformers' recurrences by marker operators while a model is traced.

A gated delta net, a Mamba-2 and a Mamba mixer each keep a state S `[batch, heads, n, p]` and
compute, token by token, with keys k, values v, queries q and decays d:

    S ← d ∘ S + k uᵀ      u = v,  or  β (v - (d ∘ S)ᵀ k)  where the delta rule corrects
    o = Sᵀ q

PyTorch's code computes chunks of a fixed length in a loop over the prompt, which no graph of any
length can hold. So the loop becomes one marker, in whose place `caches` writes a scan over tokens;
what stands around it (step sizes, norms, gates) is traced as it is. Convolutions read the last
inputs before the new ones, as a second marker.

Source: Gated Delta Networks (arXiv 2412.06464), eq. 10; Mamba-2 (arXiv 2405.21060), section 2;
Mamba (arXiv 2312.00752), eq. 2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from prune_export.errors import PlanError
from prune_export.exporters.onnx.markers import DOMAIN, OTHER


def shifted(states: torch.Tensor, kept: int | None, block: int) -> torch.Tensor:
    """Marks that the last `kept` inputs of a convolution stand before `[batch, channels, new]`.

    Gives `[batch, channels, kept + new]`.
    """
    if kept is None:
        raise PlanError("onnx", "a convolution does not say how much of the past it reads", OTHER)
    batch, channels, new = states.shape
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::Shift", [states], {"block": block, "kept": kept},
        dtype=states.dtype, shape=(batch, channels, kept + new), version=1,
    )  # fmt: skip


def _recur(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None = None,
) -> torch.Tensor:
    """Marks a recurrence over tokens in float32; gives the outputs `[batch, new, heads, p]`.

    `query` and `key` are `[batch, new, heads, n]`, `value` `[batch, new, heads, p]`, `decay`
    `[batch, new, heads, n or 1, p or 1]`, `beta` `[batch, new, heads]`; with it, values are
    corrected by the delta rule.
    """
    given = [query.unsqueeze(-2), key.unsqueeze(-1), value.unsqueeze(-2), decay]
    given += [] if beta is None else [beta[..., None, None]]
    batch, new, heads, width = value.shape
    out = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Recurrence", [one.float().transpose(0, 1) for one in given], {},
        dtype=torch.float32, shape=(new, batch, heads, 1, width), version=1,
    )  # fmt: skip
    return out.squeeze(-2).transpose(0, 1)


def _delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The gated delta rule; `g` is the logarithm of the decay."""
    heads = value.shape[2]
    query, key = (one.float() for one in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (
            one * torch.rsqrt(one.square().sum(-1, keepdim=True) + 1e-6) for one in (query, key)
        )
    query = query * query.shape[-1] ** -0.5
    if query.shape[2] != heads:
        query, key = (one.repeat_interleave(heads // one.shape[2], dim=2) for one in (query, key))
    made = _recur(query, key, value, g.float().exp()[..., None, None], beta)
    return made.to(value.dtype), None


def _mamba2(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803  # transformers' names, by which it is called
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Mamba-2's scan: one decay a head, keys and queries shared by the heads of a group."""
    heads = hidden_states.shape[2]
    step = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    step = functional.softplus(step) if dt_softplus else step
    low, high = dt_limit
    if low > 0 or not dt_softplus:
        step = step.clamp(min=low)
    if high != float("inf"):
        step = step.clamp(max=high)
    step = step.float()
    states = hidden_states.float()
    query, key = (one.float().repeat_interleave(heads // one.shape[2], dim=2) for one in (C, B))
    decay = (A.float() * step).exp()[..., None, None]
    made = _recur(query, key, states * step.unsqueeze(-1), decay)
    if D is not None:
        made = made + D.float()[..., None] * states
    return (made, None) if return_final_states else made


def _mamba(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803  # transformers' names, by which it is called
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Mamba's scan: states and steps `[batch, channels, new]`, a decay for each of a channel's."""
    step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
    step = (functional.softplus(step) if delta_softplus else step).float()
    states = hidden_states.float()
    decay = (A.float().T * step.transpose(1, 2).unsqueeze(2)).exp()  # [batch, new, n, channels]
    query, key, value = (one.float().transpose(1, 2).unsqueeze(2) for one in (C, B, states * step))
    made = _recur(query, key, value, decay.unsqueeze(2)).squeeze(2).transpose(1, 2)
    if D is not None:
        made = made + states * D.float()[:, None]
    if z is not None:
        made = made * functional.silu(z.float())
    return (made, None) if return_last_state else made


_STANDS_FOR: Final[dict[str, Callable[..., Any]]] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba_selective_scan": _mamba,
}


@contextmanager
def recurrences(model: nn.Module) -> Iterator[None]:
    """Makes transformers' code of a model use the markers inside a `with`."""
    with ExitStack() as undo:
        for name in sorted({type(module).__module__ for module in model.modules()}):
            code = sys.modules[name]
            for function, marker in _STANDS_FOR.items():
                if (own := getattr(code, function, None)) is not None:
                    setattr(code, function, marker)
                    undo.callback(setattr, code, function, own)
        yield
