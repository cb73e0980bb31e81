from collections.abc import Callable

import numpy as np
import pytest

from prune_export.verify.compare import FLOOR, compare
from prune_export.verify.speed import Effort

Noise = Callable[[np.random.Generator, int], np.ndarray]
ROLES = 3


def drift(random: np.random.Generator, samples: int) -> np.ndarray:
    """A machine whose speed wanders by some 4 % from sample to sample, and jitters."""
    walk = np.cumsum(0.04 * random.standard_t(3, samples))
    return walk + 0.02 * random.standard_t(3, samples)


def bursts(random: np.random.Generator, samples: int) -> np.ndarray:
    """A neighbour that takes 10 to 50 % of the machine, for a few samples at a time."""
    noise, busy = np.empty(samples), False
    for at in range(samples):
        if random.random() < 0.3:
            busy = random.random() < 0.35
        noise[at] = 0.01 * random.normal() + busy * random.uniform(0.1, 0.7)
    return noise


def heavy(random: np.random.Generator, samples: int) -> np.ndarray:
    """Tails so heavy that they have no variance."""
    return np.clip(0.02 * random.standard_t(2, samples), -0.5, 2)


def timings(
    random: np.random.Generator,
    noise: Noise,
    *,
    speedup: float = 1.0,
    luck: float = 0.03,
    launches: int = Effort().launches,
    rounds: int = Effort().rounds,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds `[launches, rounds]` of dense, dense again and pruned, in random order in a round."""
    order = np.array([[random.permutation(ROLES) for _ in range(rounds)] for _ in range(launches)])
    in_time = noise(random, launches * rounds * ROLES).reshape(launches, rounds, ROLES)
    log = np.take_along_axis(in_time, order, axis=2)
    log += random.normal(0, luck, (launches, 1, ROLES))
    log[..., 2] -= np.log(speedup)
    seconds = 0.05 * np.exp(log)
    return seconds[..., 0], seconds[..., 1], seconds[..., 2]


def claims(noise: Noise, count: int, **how: float) -> int:
    """In how many of `count` comparisons of equal engines a difference is claimed."""
    found = 0
    for seed in range(count):
        measured = timings(np.random.default_rng(seed), noise, **how)  # type: ignore[arg-type]
        found += compare(*measured, seed=seed).verdict != "no speedup"
    return found


def test_by_hand() -> None:
    """Without noise the intervals are points, and the floor is the least one."""
    found = compare([[3.0, 6.0], [4.5]], [[3.0, 6.0], [4.5]], [[2.0, 4.0], [3.0]])
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.floor_high == pytest.approx(1 + FLOOR)
    assert found.floor_low == pytest.approx(1 / (1 + FLOOR))
    assert found.verdict == "faster"
    assert found.width == pytest.approx(1.02 - 1 / 1.02)


def test_slower_is_symmetric() -> None:
    measured = timings(np.random.default_rng(0), drift, speedup=1 / 1.5)
    assert compare(*measured).verdict == "slower"


def test_the_median_round_is_what_counts() -> None:
    """One round that a neighbour spoilt moves nothing; unequal launches are allowed."""
    dense = [[1.0] * 6, [1.0] * 5, [1.0] * 4]
    pruned = [[0.5] * 5 + [50.0], [0.5] * 5, [0.5] * 4]
    assert compare(dense, dense, pruned).ratio == pytest.approx(2.0)


def test_difference_inside_of_the_floor_is_no_claim() -> None:
    """10 % faster, measured without noise, where dense and dense differ by 20 %."""
    found = compare([[1.0] * 5] * 3, [[1.2] * 5] * 3, [[1 / 1.1] * 5] * 3)
    assert found.low > 1
    assert found.verdict == "no speedup"


def test_same_samples_same_result() -> None:
    measured = timings(np.random.default_rng(0), bursts)
    assert compare(*measured, seed=3) == compare(*measured, seed=3)


@pytest.mark.parametrize("noise", [drift, bursts, heavy])
@pytest.mark.parametrize("luck", [0.0, 0.03])
def test_equal_engines_claim_nothing(noise: Noise, luck: float) -> None:
    """150 comparisons, five times as many as must pass on a real machine."""
    assert claims(noise, 150, luck=luck) == 0


@pytest.mark.parametrize("noise", [drift, bursts, heavy])
def test_one_launch_would_be_deceived(noise: Noise) -> None:
    """Why there are launches: as many rounds within one take a process's luck for an effect."""
    assert claims(noise, 150, launches=1, rounds=24) >= 3


@pytest.mark.parametrize("noise", [drift, heavy])
def test_a_true_speedup_is_found(noise: Noise) -> None:
    """1.4 times faster, with the least effort, under noise and luck."""
    found = [
        compare(*timings(np.random.default_rng(seed), noise, speedup=1.4), seed=seed)
        for seed in range(40)
    ]
    assert sum(one.verdict == "faster" for one in found) >= 38
    assert sum(one.low <= 1.4 <= one.high for one in found) >= 32
