from __future__ import annotations

from math import pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prune_export.numeric.scores import angles, least, run_sums, runs, turned


def test_angles_worked_by_hand() -> None:
    points = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-4.0, 0.0]])
    expected = [[0, 1 / 4, 1 / 2, 1], [1 / 4, 0, 1 / 4, 3 / 4], [1 / 2, 1 / 4, 0, 1 / 2],
                [1, 3 / 4, 1 / 2, 0]]  # fmt: skip
    torch.testing.assert_close(angles(points), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7, 1e-12])
def test_small_angles_keep_their_digits(angle: float) -> None:
    turn = torch.tensor(angle, dtype=torch.float64)
    points = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.tensor([1.0, 0.0])])
    assert float(angles(points)[0, 1]) == pytest.approx(angle / pi, rel=1e-9)
    assert float(turned(points[:1], points[1:])) == pytest.approx(angle**2 / 2, rel=1e-3)


def test_turned_is_one_minus_the_cosine() -> None:
    before, after = torch.randn(2, 50, 8, dtype=torch.float64)
    expected = 1 - torch.nn.functional.cosine_similarity(before, after)
    torch.testing.assert_close(turned(before, after), expected)


def test_a_state_of_zeros_gives_numbers() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert torch.isfinite(angles(points)).all()
    assert torch.isfinite(turned(points[:1], points[1:])).all()


def test_runs_worked_by_hand() -> None:
    distances = torch.tensor([[0, 1, 2, 3], [1, 0, 4, 5], [2, 4, 0, 6], [3, 5, 6, 0]])
    assert runs(distances, 1) == [1, 4, 6]
    assert runs(distances, 2) == [2, 5]
    assert runs(distances, 3) == [3]
    assert run_sums([1, 2, 4, 8], 2) == [3, 6, 12]


def test_of_equal_scores_the_deeper_comes_first() -> None:
    assert least([3, 1, 2, 1]) == [3, 1, 2, 0]


@given(st.lists(st.floats(allow_nan=False), max_size=20))
def test_least_orders_every_position(scores: list[float]) -> None:
    order = least(scores)
    assert sorted(order) == list(range(len(scores)))
    assert [scores[i] for i in order] == sorted(scores)
