from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.calibrate import TokenSet
from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.quality import measure_perplexity, perplexity
from prune_export.verify.streamed import streamed_losses


def test_by_hand() -> None:
    """exp of the mean of the windows' losses."""
    found = perplexity("dense", [np.log(2.0), np.log(8.0)], 5)
    assert found.value == pytest.approx(4.0)
    assert (found.windows, found.length, found.tokens) == (2, 5, 8)


def test_refuses_a_loss_that_is_not_finite() -> None:
    with pytest.raises(VerifyError, match="loss of window 1 is nan"):
        perplexity("dense", [1.0, float("nan")], 5)


def test_refuses_no_windows(tiny: Path, machine: Machine) -> None:
    tokens = TokenSet(torch.zeros(0, 8, dtype=torch.int64), "")
    with pytest.raises(VerifyError, match="at least one window"):
        measure_perplexity("dense", Engine.pytorch(tiny), tokens, machine)


@pytest.mark.parametrize("ram_bytes", [100_000, 2 << 40])
def test_streams_blocks(tiny: Path, machine: Machine, ids: np.ndarray, ram_bytes: int) -> None:
    """A window at a time, or all together; in both cases a block at a time."""
    task = _Counting()
    losses = streamed_losses(tiny, ids, replace(machine, ram_bytes=ram_bytes), task)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [torch.from_numpy(row)[None] for row in ids]
        expected = [float(model(input_ids=row, labels=row).loss) for row in rows]
    assert losses == pytest.approx(expected, abs=1e-5)
    assert task.done == pytest.approx(len(ids))


def test_model_larger_than_memory_is_streamed(
    tiny: Path, machine: Machine, ids: np.ndarray
) -> None:
    tokens = TokenSet(torch.from_numpy(ids), "")
    short = replace(machine, ram_bytes=100_000)
    found = measure_perplexity("dense", Engine.pytorch(tiny), tokens, short)
    assert found.losses == streamed_losses(tiny, ids, short, _Counting())


class _Counting:
    done = 0.0

    def advance(self, steps: float = 1) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        del text


@pytest.mark.slow
def test_is_that_of_transformers(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    tokens = TokenSet(torch.from_numpy(ids), "")
    found = measure_perplexity("dense", Engine.pytorch(tiny), tokens, machine, windows=4)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    four = torch.from_numpy(ids)[:4]
    with torch.inference_mode():
        expected = float(model(input_ids=four, labels=four).loss)
    assert np.log(found.value) == pytest.approx(expected, abs=1e-5)
    assert found.windows == 4


@pytest.mark.slow
def test_what_counts_is_measured_alike_whole_and_streamed(
    tiny: Path, machine: Machine, ids: np.ndarray
) -> None:
    counted = np.random.default_rng(2).random(ids.shape) < 0.3
    counted[:, 9] = True
    tokens = TokenSet.of(torch.from_numpy(ids), counted=torch.from_numpy(counted))
    found = measure_perplexity("dense", Engine.pytorch(tiny), tokens, machine)
    short = replace(machine, ram_bytes=100_000)
    streamed = measure_perplexity("dense", Engine.pytorch(tiny), tokens, short)
    assert found.losses == pytest.approx(streamed.losses, abs=1e-5)
    assert found.tokens == streamed.tokens == int(counted[:, 1:].sum())
    everything = measure_perplexity("dense", Engine.pytorch(tiny), TokenSet.of(tokens.ids), short)
    assert everything.tokens == 5 * 47
    assert everything.value != pytest.approx(found.value, rel=1e-3)
