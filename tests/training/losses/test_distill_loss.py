from __future__ import annotations

from typing import Any

import pytest
import torch

from prune_export.training.losses import loss as _loss
from prune_export.training.losses.distill_loss import Answers, distill_loss
from prune_export.training.losses.loss import next_token_loss
from prune_export.training.losses.objective import Distill
from tests.training.losses.test_divergence import KINDS, defined

VOCAB = 50
HOWS = [
    *(Distill(divergence=kind, beta=beta) for kind, beta in KINDS),
    Distill(temperature=2.5),
    Distill(cross_entropy=0.3),
    Distill(divergence="jsd", temperature=0.7, cross_entropy=0.6),
    Distill(cross_entropy=1.0),
]


def both(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, 11))
    return 2 * torch.randn(3, 11, VOCAB), 2 * torch.randn(3, 11, VOCAB), ids


def kept(teacher: torch.Tensor, k: int, temperature: float = 1.0) -> Answers:
    """The k likeliest tokens and all others together, as a cache has them."""
    log_p = (teacher[:, :-1] / temperature).log_softmax(-1)
    top, ids = log_p.topk(k)
    if k < VOCAB:
        others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        top = torch.cat([top, others], dim=-1)
    return Answers(ids=ids.int(), log_p=top)


def expected(
    student: torch.Tensor, log_p: torch.Tensor, log_q: torch.Tensor, ids: torch.Tensor,
    counted: torch.Tensor | None, how: Distill,
) -> torch.Tensor:  # fmt: skip
    """By the definition, in float64."""
    loss = how.temperature**2 * defined(how.divergence, how.beta, log_p, log_q)
    entropy = torch.nn.functional.cross_entropy(
        student[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    mixed = (1 - how.cross_entropy) * loss + how.cross_entropy * entropy
    weights = torch.ones_like(mixed) if counted is None else counted[:, 1:].double()
    return (mixed * weights).sum() / weights.sum()


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_equal_the_definition(
    how: Distill, rows: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_loss._ROWS_ELEMENTS, "cpu", rows * VOCAB)
    student, teacher, ids = both()
    counted = torch.rand(3, 11) < 0.4 if masked else None
    theirs = student.double().requires_grad_()
    log_p = (teacher[:, :-1].double() / how.temperature).log_softmax(-1)
    log_q = (theirs[:, :-1] / how.temperature).log_softmax(-1)
    wanted = expected(theirs, log_p, log_q, ids, counted, how)
    (wanted * 0.3).backward()
    ours = student.clone().requires_grad_()
    loss = distill_loss(ours, Answers(logits=teacher.clone()), ids, counted, how)
    (loss * 0.3).backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-7)
    assert not ours.grad[:, -1].any()


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("k", [1, 8, VOCAB - 1])
def test_kept_answers_are_a_divergence_over_their_outcomes(
    how: Distill, rows: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_loss._ROWS_ELEMENTS, "cpu", rows * VOCAB)
    student, teacher, ids = both(1)
    answers = kept(teacher, k, how.temperature)
    assert answers.ids is not None
    assert answers.log_p is not None
    theirs = student.double().requires_grad_()
    q = (theirs[:, :-1] / how.temperature).softmax(-1)
    own = q.gather(-1, answers.ids.long())
    others = q.scatter(-1, answers.ids.long(), 0).sum(-1, keepdim=True)
    log_q = torch.cat([own, others], dim=-1).log()
    wanted = expected(theirs, answers.log_p.double(), log_q, ids, None, how)
    wanted.backward()
    ours = student.clone().requires_grad_()
    loss = distill_loss(ours, answers, ids, None, how)
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-5)
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("how", HOWS)
def test_all_tokens_kept_equal_the_teacher_itself(how: Distill) -> None:
    student, teacher, ids = both(2)
    grads, losses = [], []
    for answers in (kept(teacher, VOCAB, how.temperature), Answers(logits=teacher.clone())):
        ours = student.clone().requires_grad_()
        loss = distill_loss(ours, answers, ids, None, how)
        loss.backward()
        losses.append(loss.item())
        grads.append(ours.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-8)


def test_fewer_outcomes_never_say_more() -> None:
    """Taking outcomes together can only lower a divergence, and it never falls below zero."""
    student, teacher, ids = both(3)
    for how in (Distill(), Distill(divergence="reverse_kl"), Distill(divergence="jsd")):
        found = [
            distill_loss(student, kept(teacher, k), ids, None, how).item()
            for k in (1, 2, 8, 32, VOCAB)
        ]
        assert found == sorted(found)
        assert found[0] > 0
        same = distill_loss(teacher, kept(teacher, 8), ids, None, how).item()
        assert 0 <= same < 1e-6


def test_cross_entropy_alone_is_the_next_token_loss() -> None:
    student, teacher, ids = both(4)
    loss = distill_loss(student, Answers(teacher), ids, None, Distill(cross_entropy=1.0))
    assert loss.item() == pytest.approx(next_token_loss(student, ids).item(), rel=1e-6)


def test_the_gradient_takes_the_place_of_the_teachers_logits() -> None:
    """Nothing else of tokens x vocabulary is allocated; without a gradient they stay."""
    student, teacher, ids = both(5)
    ours = student.clone().requires_grad_()
    before = teacher.clone()
    distill_loss(student, Answers(teacher), ids, None, Distill())
    assert torch.equal(teacher, before)
    loss = distill_loss(ours, Answers(teacher), ids, None, Distill())
    saved: Any = loss.grad_fn
    assert saved.saved_tensors[0].data_ptr() == teacher.data_ptr()


def test_bfloat16_logits_are_compared_in_float32() -> None:
    student, teacher, ids = (
        part.bfloat16() if part.is_floating_point() else part for part in both()
    )
    ours = student.clone().requires_grad_()
    loss = distill_loss(ours, Answers(teacher.clone()), ids, None, Distill())
    loss.backward()
    theirs = student.double().requires_grad_()
    wanted = expected(
        theirs, teacher[:, :-1].double().log_softmax(-1), theirs[:, :-1].log_softmax(-1), ids,
        None, Distill(),
    )  # fmt: skip
    wanted.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=1e-6)
