"""How far a student's next-token distribution is from its teacher's, and which way that falls.

Outcomes are tokens, or a few tokens and all others together; a row of log-probabilities sums to one
over them. With P the teacher's and Q = softmax(u) the student's, each function gives the divergence
of every row and its gradient by u, Q * (g - sum(Q * g)) with g the derivative by Q, from formulas,
so that no graph over a vocabulary is held.

Source: forward and reverse KL: Gu et al., MiniLLM (2306.08543), section 2; generalized JSD: Agarwal
et al., On-Policy Distillation (2306.13649), section 2, with M = beta * P + (1 - beta) * Q.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

Measured = tuple[torch.Tensor, torch.Tensor]


def divergence(
    kind: Divergence, log_p: torch.Tensor, log_q: torch.Tensor, beta: float = 0.5
) -> Measured:
    """The divergence of rows `[rows, outcomes]` in nats `[rows]`, and its gradient by u.

    The weighted limits of a generalized JSD vanish, so that `beta` 0 and 1 stand for what they are
    limits of: forward and reverse KL.
    """
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        loss, slope = _forward_kl(log_p, log_q)
    elif kind == "reverse_kl" or beta == 1:
        loss, slope = _reverse_kl(log_p, log_q)
    else:
        loss, slope = _jsd(log_p, log_q, beta)
    return loss.clamp_(min=0), slope  # rounding takes that of equals below 0


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Measured:
    """KL(P, Q): the student is to cover all that the teacher says."""
    p = log_p.exp()
    loss = (p * (log_p - log_q)).sum(-1)
    return loss, log_q.exp().sub_(p)


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> Measured:
    """KL(Q, P): the student is to say nothing that the teacher would not."""
    q, gap = log_q.exp(), log_q - log_p
    loss = (q * gap).sum(-1)
    return loss, gap.sub_(loss.unsqueeze(-1)).mul_(q)


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> Measured:
    """Gives beta * KL(P, M) + (1 - beta) * KL(Q, M)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_p = (log_p.exp() * (log_p - log_m)).sum(-1)
    q, gap = log_q.exp(), log_q - log_m
    of_q = (q * gap).sum(-1)
    slope = gap.sub_(of_q.unsqueeze(-1)).mul_(q).mul_(1 - beta)
    return beta * of_p + (1 - beta) * of_q, slope
