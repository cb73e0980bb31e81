from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.contracts import Runner
from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.verify import drive
from prune_export.verify.pytorch import PyTorch


@pytest.fixture(params=["all", "last"])
def runner(request: pytest.FixtureRequest, tiny: Path, machine: Machine) -> Iterator[Runner]:
    with PyTorch(logits=request.param).open(tiny, machine) as opened:
        yield opened


def expected_losses(checkpoint: Path, ids: np.ndarray) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [torch.from_numpy(row)[None] for row in ids]
        return [float(model(input_ids=row, labels=row).loss) for row in rows]


def test_losses_are_those_of_transformers(
    runner: Runner, tiny: Path, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole windows in chunks that do not divide them, or token by token, three at a time."""
    monkeypatch.setattr(drive, "CHUNK", 13)
    seen: list[int] = []
    losses = drive.window_losses(runner, ids, seen.append, batch=3)
    assert losses == pytest.approx(expected_losses(tiny, ids), abs=1e-5)
    assert sum(seen) == len(ids)


def test_no_windows_no_losses(runner: Runner, ids: np.ndarray) -> None:
    assert drive.window_losses(runner, ids[:0], print) == []


def test_cached_logits_are_the_uncached(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    with PyTorch().open(tiny, machine) as runner:
        whole, _ = runner.step(ids)
        got = drive.cached_logits(runner, ids, 7)
    assert got.shape == whole.shape
    np.testing.assert_allclose(got, whole, atol=2e-5)


class Narrow:
    """A runner whose engine takes two sequences at once."""

    most_sequences = 2

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.batches: list[int] = []

    def reset(self) -> None:
        self._runner.reset()

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        self.batches.append(len(ids))
        return self._runner.step(ids)


def test_an_engine_is_fed_no_more_sequences_than_it_takes(
    tiny: Path, machine: Machine, ids: np.ndarray
) -> None:
    """Five windows, where whoever measures would feed them together."""
    with PyTorch(logits="last").open(tiny, machine) as runner:
        narrow: Any = Narrow(runner)
        np.testing.assert_allclose(
            drive.cached_logits(narrow, ids, 7), drive.cached_logits(runner, ids, 7), atol=2e-5
        )
        assert drive.window_losses(narrow, ids, lambda _: None) == pytest.approx(
            drive.window_losses(runner, ids, lambda _: None), abs=1e-5
        )
        assert max(narrow.batches) == 2


def test_cached_logits_of_last_positions(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    with PyTorch(logits="last").open(tiny, machine) as runner:
        assert drive.cached_logits(runner, ids, 7).shape == (5, 8, 256)


def test_continuations_are_those_of_generate(runner: Runner, tiny: Path) -> None:
    """Prompts of unequal length share a batch without disturbing each other."""
    prompts = [[5, 6, 7, 8, 9], [200], [17, 3, 99]]
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=10, do_sample=False, eos_token_id=-1)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    steps: list[int] = []
    assert drive.continuations(runner, prompts, 10, steps.append) == expected
    assert sum(steps) == 5 - 1 + 10 - 1


def test_continuations_refuse_an_empty_prompt(runner: Runner) -> None:
    with pytest.raises(VerifyError, match="empty prompt"):
        drive.continuations(runner, [[1], []], 4, print)


def test_greedy_tokens_are_those_of_continuations(runner: Runner) -> None:
    taught = drive.greedy(runner, np.array([5, 6, 7]), 6)
    assert taught.tokens.tolist() == drive.continuations(runner, [[5, 6, 7]], 6, print)[0]
    assert (taught.logits.argmax(axis=-1) == taught.tokens).all()


def test_timing_leaves_no_cache_behind(runner: Runner, ids: np.ndarray) -> None:
    before, _ = runner.step(ids[:2, :4])
    prefill, decode = drive.time_once(runner, ids[:2], 40)
    after, _ = runner.step(ids[:2, :4])
    np.testing.assert_array_equal(before, after)
    assert prefill > 0
    assert decode > 0


def test_losses_over_what_counts(runner: Runner, tiny: Path, ids: np.ndarray) -> None:
    counted = np.random.default_rng(1).random(ids.shape) < 0.3
    counted[:, 9] = True
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    rows = torch.from_numpy(ids)
    labels = rows.masked_fill(torch.from_numpy(~counted), -100)
    with torch.inference_mode():
        expected = [
            float(model(input_ids=row[None], labels=own[None]).loss)
            for row, own in zip(rows, labels, strict=True)
        ]
    found = drive.window_losses(runner, ids, lambda _: None, counted=counted, batch=2)
    assert found == pytest.approx(expected, abs=1e-5)
