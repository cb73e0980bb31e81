from __future__ import annotations

import pytest
import torch

from prune_export.training.losses import loss as _loss
from prune_export.training.losses.loss import next_token_loss, predictions


def reference(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    )


def test_two_tokens_by_hand() -> None:
    # One prediction: softmax of (0, ln 3) is (1/4, 3/4), and the next token is 0.
    logits = torch.tensor([[[0.0, 3.0], [9.0, 9.0]]]).log().nan_to_num(0.0)
    logits[0, 0] = torch.tensor([0.0, torch.log(torch.tensor(3.0))])
    loss = next_token_loss(logits, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_loss_and_gradient_equal_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_loss._ROWS_ELEMENTS, "cpu", rows * 50)
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 11))
    ours = torch.randn(3, 11, 50, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    (next_token_loss(ours, ids) * 0.3).backward()
    (reference(theirs, ids) * 0.3).backward()
    assert next_token_loss(ours, ids).item() == pytest.approx(reference(theirs, ids).item(), 1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert not ours.grad[:, -1].any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 64))
    ours = (4 * torch.randn(2, 64, 300)).bfloat16().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss = next_token_loss(ours, ids)
    loss.backward()
    reference(theirs, ids).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(theirs, ids).item(), rel=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-7)


def test_measuring_makes_no_gradient() -> None:
    logits = torch.randn(1, 4, 9)
    with torch.no_grad():
        assert next_token_loss(logits, torch.tensor([[1, 2, 3, 4]])).grad_fn is None


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_tokens_that_do_not_count_have_no_part(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_loss._ROWS_ELEMENTS, "cpu", rows * 50)
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (3, 11))
    counted = torch.rand(3, 11) < 0.4
    ours = torch.randn(3, 11, 50, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    labels = ids.masked_fill(~counted, -100)[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), labels)
    loss = next_token_loss(ours, ids, counted)
    (loss * 0.3).backward()
    (expected * 0.3).backward()
    assert loss.item() == pytest.approx(expected.item(), 1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)
    assert predictions(ids, counted) == int(counted[:, 1:].sum())
    everything = torch.ones_like(counted)
    assert next_token_loss(ours, ids, everything).item() == next_token_loss(ours, ids).item()
    assert predictions(ids, everything) == predictions(ids, None) == 30
