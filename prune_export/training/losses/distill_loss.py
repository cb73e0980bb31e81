"""The loss of a student that learns from a teacher, a few rows of the logits at a time.

As in `loss`, the gradient is made in the forward pass. The teacher's own logits are needed once:
the gradient takes their place, so that beside the student's nothing else of tokens x vocabulary is
held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prune_export.training.losses.divergence import divergence
from prune_export.training.losses.loss import counted_weights, rows_at_once
from prune_export.training.losses.objective import Distill


@dataclass(frozen=True)
class Answers:
    """What a teacher said to windows `[windows, length]`, at the temperature of the loss.

    Either `logits` `[windows, length, vocab]`, which are overwritten; or, of the first `length - 1`
    positions, its most likely tokens `ids` `[windows, length - 1, k]` and `log_p` `[…, k + 1]`, the
    last of which is of all other tokens together (left out where there is none).
    """

    logits: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    log_p: torch.Tensor | None = None


def distill_loss(
    logits: torch.Tensor,
    answers: Answers,
    ids: torch.Tensor,
    counted: torch.Tensor | None,
    how: Distill,
) -> torch.Tensor:
    """The mean divergence from the teacher over what counts, times the temperature's square.

    With `cross_entropy` c it is (1 - c) times that and c times the next-token loss. `logits`, `ids`
    and `counted` are as in `next_token_loss`.
    """
    return _Distilled.apply(logits, answers, ids, counted, how)  # type: ignore[no-untyped-call, no-any-return]


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        answers: Answers,
        ids: torch.Tensor,
        marks: torch.Tensor | None,
        how: Distill,
    ) -> torch.Tensor:
        vocab = logits.shape[-1]
        flat = logits.reshape(-1, vocab)
        following = torch.roll(ids, -1, dims=1).reshape(-1)
        weight = counted_weights(ids, marks)
        said = _Said.of(answers, ids.shape[1], vocab)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        grad = None
        if ctx.needs_input_grad[0]:
            grad = torch.empty_like(flat) if said.logits is None else said.logits
            if grad.dtype != flat.dtype:
                grad = torch.empty_like(flat)
        rows = rows_at_once(logits)
        for start in range(0, len(flat), rows):
            part = slice(start, start + rows)
            z = flat[part].float()
            loss, slope = said.compare(part, z, how)
            loss, slope = loss * how.temperature**2, slope.mul_(how.temperature)
            if how.cross_entropy:
                c, picked = how.cross_entropy, following[part].unsqueeze(1)
                log_q = torch.log_softmax(z, dim=-1)
                loss = (1 - c) * loss - c * log_q.gather(1, picked).squeeze(1)
                q = log_q.exp_()
                q.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=q.dtype))
                slope.mul_(1 - c).add_(q, alpha=c)
            total += (loss * weight[part]).sum(dtype=torch.float64)
            if grad is not None:
                grad[part] = slope.mul_(weight[part].unsqueeze(1))
        if grad is not None:
            ctx.save_for_backward(grad.view_as(logits))
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * outer[0], None, None, None, None


@dataclass(frozen=True)
class _Said:
    """A teacher's answers by row of the logits; a window's last row stands for nothing."""

    logits: torch.Tensor | None
    ids: torch.Tensor | None
    log_p: torch.Tensor | None
    length: int

    @staticmethod
    def of(answers: Answers, length: int, vocab: int) -> _Said:
        if answers.logits is not None:
            return _Said(answers.logits.view(-1, vocab), None, None, length)
        assert answers.ids is not None
        assert answers.log_p is not None
        return _Said(None, answers.ids.flatten(0, 1), answers.log_p.flatten(0, 1), length)

    def compare(
        self, part: slice, z: torch.Tensor, how: Distill
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergences of rows of a student's logits `z`, and their gradient by z / T."""
        log_q = torch.log_softmax(z / how.temperature, dim=-1)  # [rows, vocab]
        if self.logits is not None:
            log_p = torch.log_softmax(self.logits[part].float() / how.temperature, dim=-1)
            return divergence(how.divergence, log_p, log_q, how.beta)
        assert self.ids is not None
        assert self.log_p is not None
        rows = torch.arange(part.start, part.start + len(z), device=z.device)
        # A window's last row has no answer; it counts for nothing, and may read any.
        at = (rows - rows // self.length).clamp_(max=len(self.ids) - 1)
        ids, log_p = self.ids[at].long(), self.log_p[at].float()
        return _by_outcomes(log_p, log_q, ids, how)


def _by_outcomes(
    log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor, how: Distill
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence over `ids` and all other tokens together, and its gradient by each token.

    What falls to the others is shared among them as they are likely: d/dz_i = d/du * q_i / Q.
    """
    own = log_q.gather(1, ids)
    if log_p.shape[1] == ids.shape[1]:
        loss, slope = divergence(how.divergence, log_p, own, how.beta)
        return loss, torch.zeros_like(log_q).scatter_(1, ids, slope)
    others = log_q.scatter(1, ids, -torch.inf)
    of_others = torch.logsumexp(others, dim=1, keepdim=True)
    loss, slope = divergence(how.divergence, log_p, torch.cat([own, of_others], dim=1), how.beta)
    spread = others.sub_(of_others).exp_().mul_(slope[:, -1:])
    return loss, spread.scatter_(1, ids, slope[:, :-1])
