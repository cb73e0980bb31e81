"""Tokens picked from logits, and texts drawn from engines."""

from __future__ import annotations

import numpy as np
import torch

from prune_export.sampling import Dice, Sampling, picked, seed_of
from prune_export.verify.drive import drawn


def test_tokens_are_picked_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -40.0]])
    numbers = (torch.arange(10_000) + 0.5) / 10_000
    found = picked(logits.expand(10_000, 4), numbers.double(), Sampling(temperature=2.0))
    counts = torch.bincount(found, minlength=4) / 10_000
    torch.testing.assert_close(counts, torch.softmax(logits[0] / 2, dim=0), rtol=0, atol=2e-4)


def test_top_p_leaves_the_likeliest_that_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    numbers = ((torch.arange(1000) + 0.5) / 1000).double()
    for top_p, tokens in (
        (0.4, {0}),
        (0.5, {0}),
        (0.51, {0, 2}),
        (0.8, {0, 2}),
        (1.0, {0, 1, 2, 3}),
    ):
        found = picked(logits.expand(1000, 4), numbers, Sampling(1.0, top_p))
        assert set(found.tolist()) == tokens


def test_no_temperature_takes_the_likeliest_and_the_last_number_a_token_that_can_be() -> None:
    logits = torch.tensor([[0.0, 3.0, -torch.inf]])
    assert picked(logits, torch.tensor([0.999]).double(), Sampling(0.0)).tolist() == [1]
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert picked(logits, last, Sampling()).tolist() == [1]


class Counting:
    """An engine whose logits follow from the tokens so far; as `Runner` has it."""

    def __init__(self, vocab: int = 32) -> None:
        self.vocab, self.fed = vocab, np.empty((0, 0), np.int64)

    def reset(self) -> None:
        self.fed = np.empty((0, 0), np.int64)

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        self.fed = ids if not self.fed.size else np.concatenate([self.fed, ids], axis=1)
        rows = []
        for row in self.fed:
            random = torch.Generator().manual_seed(seed_of(*row.tolist()))
            rows.append(torch.randn(self.vocab, generator=random) * 2)
        return torch.stack(rows).unsqueeze(1).numpy(), 0.0


def test_a_text_is_the_same_whatever_is_drawn_beside_it() -> None:
    prompts, seeds = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [11, 12, 13]

    def draw(which: list[int]) -> list[list[int]]:
        return drawn(
            Counting(), [prompts[one] for one in which], 12, lambda count: None,
            how=Sampling(0.9, 0.95), seeds=[seeds[one] for one in which], ends={0},
        )  # fmt: skip

    together = draw([0, 1, 2])
    assert [draw([one])[0] for one in range(3)] == together
    assert all(1 <= len(text) <= 12 for text in together)
    assert together[0] != draw([0])[0][::-1]


def test_texts_end_with_the_first_end() -> None:
    texts = drawn(
        Counting(4), [[1]] * 20, 30, lambda count: None,
        how=Sampling(), seeds=list(range(20)), ends={0},
    )  # fmt: skip
    assert all(text[-1] == 0 and 0 not in text[:-1] for text in texts if len(text) < 30)
    assert len({tuple(text) for text in texts}) > 3


def test_dice_go_on_row_by_row() -> None:
    both, second = Dice([1, 2]), Dice([2])
    both.roll([0])
    assert both.roll([1]).tolist() == second.roll([0]).tolist()
