"""Computes the next-token loss with little memory: a few rows of the logits at a time.

The usual path holds the logits four times over in float32 (a copy, its log-softmax, two
gradients), which for a small model with a large vocabulary is most of the memory and a third of
the time. Here the gradient is made in the forward pass, rows that fit the cache at a time, and is
all that is kept.
"""

from __future__ import annotations

from typing import Any, Final

import torch

_ROWS_ELEMENTS: Final = {"cpu": 1 << 20, "cuda": 1 << 26}


def next_token_loss(
    logits: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean cross entropy (nats) of each token given those before it.

    `logits` are `[windows, length, vocab]` for `ids` int64 `[windows, length]`; the last position
    of a window predicts nothing. Where `counted` bool `[windows, length]` is given, the mean is
    over the tokens that it marks. Equal to `torch.nn.functional.cross_entropy` in float32.
    """
    return _NextToken.apply(logits, ids, counted)  # type: ignore[no-untyped-call, no-any-return]


def predictions(ids: torch.Tensor, counted: torch.Tensor | None) -> int:
    """Counts the tokens of windows whose loss counts in `next_token_loss`."""
    return ids.shape[0] * (ids.shape[1] - 1) if counted is None else int(counted[:, 1:].sum())


def counted_weights(ids: torch.Tensor, marks: torch.Tensor | None) -> torch.Tensor:
    """The share of each position `[windows * length]` in a mean over the tokens that count."""
    counted = torch.ones_like(ids, dtype=torch.float32)
    if marks is not None:
        counted = torch.roll(marks, -1, dims=1).float()
    counted[:, -1] = 0
    return counted.reshape(-1) / max(1, predictions(ids, marks))


def rows_at_once(logits: torch.Tensor) -> int:
    """How many rows of logits are worked on at a time."""
    return max(1, _ROWS_ELEMENTS.get(logits.device.type, 1 << 20) // logits.shape[-1])


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, marks: torch.Tensor | None
    ) -> torch.Tensor:
        vocab = logits.shape[-1]
        flat = logits.reshape(-1, vocab)
        following = torch.roll(ids, -1, dims=1).reshape(-1)
        weight = counted_weights(ids, marks)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        grad = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        rows = rows_at_once(logits)
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            log_p = torch.log_softmax(flat[part].float(), dim=-1)  # [rows, vocab]
            picked = following[part].unsqueeze(1)
            total -= (log_p.gather(1, picked).squeeze(1) * weight[part]).sum(dtype=torch.float64)
            if grad is not None:
                p = log_p.exp_()
                p.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=p.dtype))
                grad[part] = p.mul_(weight[part].unsqueeze(1))
        if grad is not None:
            ctx.save_for_backward(grad.view_as(logits))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * outer[0], None, None
