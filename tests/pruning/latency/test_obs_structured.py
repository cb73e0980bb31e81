"""Structured brain surgery and the search for levels, against brute force."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.errors import PlanError
from prune_export.pruning.latency import obs_structured
from prune_export.pruning.latency.spdy import Levels, cheapest, search


def case(inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and inputs that depend on each other, float64."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=random, dtype=torch.float64)
    states = torch.randn(300, inputs, generator=random, dtype=torch.float64) @ mixed
    return torch.randn(outputs, inputs, generator=random, dtype=torch.float64), states


def refitted(
    weight: torch.Tensor, states: torch.Tensor, kept: list[int]
) -> tuple[torch.Tensor, float]:
    """By least squares: the best matrix on the inputs `kept`, and its relative error."""
    wanted = states @ weight.T
    solution = torch.linalg.lstsq(states[:, kept], wanted).solution
    return solution.T, float((states[:, kept] @ solution - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_left_is_the_least_squares_fit(size: int) -> None:
    weight, states = case(12, 5)
    groups = [list(range(i, i + size)) for i in range(0, 12, size)]
    found = obs_structured.removed(weight, states.T @ states, groups, [len(groups) - 1, 2])
    inputs = [i for group in found.kept for i in groups[group]]
    solution, error = refitted(weight, states, inputs)
    torch.testing.assert_close(found.weight[:, inputs], solution, atol=2e-3, rtol=2e-3)
    assert found.errors[2] == pytest.approx(error, rel=1e-2)
    gone = [i for i in range(12) if i not in inputs]
    assert not found.weight[:, gone].any()
    assert sorted(found.order) == sorted(set(range(len(groups))) - set(found.kept))


def test_each_removal_is_the_cheapest_of_all() -> None:
    weight, states = case(8, 4, seed=3)
    order = obs_structured.removed(weight, states.T @ states, [[i] for i in range(8)], [3]).order
    left = list(range(8))
    for taken in order:
        errors = {i: refitted(weight, states, [j for j in left if j != i])[1] for i in left}
        assert taken == min(errors, key=errors.__getitem__)
        left.remove(taken)


def test_what_no_output_reads_and_what_never_comes_costs_nothing() -> None:
    weight, states = case(10, 4)
    weight[:, 2] = 0
    states[:, 7] = 0
    found = obs_structured.removed(weight, states.T @ states, [[i] for i in range(10)], [8])
    assert found.kept == (0, 1, 3, 4, 5, 6, 8, 9)
    assert found.errors[8] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found.weight[:, found.kept], weight[:, found.kept])


def test_many_inputs_go_several_at_a_time_and_exactly_as_many_as_asked() -> None:
    weight, states = case(600, 3)
    found = obs_structured.removed(weight, states.T @ states, [[i] for i in range(600)], [411, 77])
    assert len(found.kept) == 77
    assert len(set(found.order)) == 523
    assert 0 < found.errors[411] < found.errors[77]


def brute(parts: list[Levels], weights: list[float], budget: float) -> float:
    best = float("inf")
    for levels in product(*(range(len(part.times)) for part in parts)):
        time = sum(part.times[level] for part, level in zip(parts, levels, strict=True))
        if time <= budget + 1e-12:
            cost = (w * p.errors[i] for w, p, i in zip(weights, parts, levels, strict=True))
            best = min(best, sum(cost))
    return best


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_levels_are_the_cheapest_of_all_combinations(data: st.DataObject) -> None:
    """Times are whole buckets, so that rounding changes nothing."""
    number = st.integers(0, 9)
    parts, weights = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 4))
        errors = data.draw(st.lists(number, min_size=count, max_size=count))
        times = data.draw(st.lists(number, min_size=count, max_size=count))
        parts.append(Levels(tuple(map(float, errors)), tuple(map(float, times))))
        weights.append(float(data.draw(st.integers(0, 3))))
    budget = float(data.draw(st.integers(1, 20)))
    expected = brute(parts, weights, budget)
    if expected == float("inf"):
        with pytest.raises(PlanError):
            cheapest(parts, weights, budget, buckets=int(budget))
        return
    levels = cheapest(parts, weights, budget, buckets=int(budget))
    chosen = list(zip(parts, levels, strict=True))
    assert sum(part.times[level] for part, level in chosen) <= budget
    costs = (w * p.errors[i] for w, (p, i) in zip(weights, chosen, strict=True))
    assert sum(costs) == expected


def test_times_are_never_rounded_down() -> None:
    part = Levels((0.0, 1.0), (0.34, 0.3))
    assert cheapest([part] * 3, [1.0] * 3, 1.0, buckets=100) == (1, 0, 0)


def test_the_search_finds_what_the_errors_hide() -> None:
    """Errors say that all parts are alike; the loss says that the last one matters most."""
    parts = [Levels((0.0, 0.5, 1.0), (1.0, 0.5, 0.0))] * 8

    def loss_of(levels: tuple[int, ...]) -> float:
        return 10.0 * levels[-1] + sum(levels[:-1])

    found = search(parts, 4.0, loss_of, tries=60)
    assert found.levels[-1] == 0
    assert found.loss == loss_of(found.levels) == min(found.tried)
    assert found == search(parts, 4.0, loss_of, tries=60), "the same seed finds the same"
