from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prune_export.errors import MissingExtra, PlanError, VerifyError
from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.pytorch import PyTorch


def test_logits_of_last_position_only(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    with PyTorch().open(tiny, machine) as whole, PyTorch(logits="last").open(tiny, machine) as last:
        expected, got = whole.step(ids)[0], last.step(ids)[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected[:, -1:], atol=1e-5)


def test_reset_forgets(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    with PyTorch().open(tiny, machine) as runner:
        first, _ = runner.step(ids)
        second, _ = runner.step(ids)
        runner.reset()
        third, _ = runner.step(ids)
    np.testing.assert_array_equal(first, third)
    assert np.abs(first - second).max() > 1e-2


def test_streams_a_model_larger_than_memory(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    with PyTorch().open(tiny, machine) as whole:
        expected, _ = whole.step(ids)
    with PyTorch().open(tiny, replace(machine, ram_bytes=100_000)) as streamed:
        got, _ = streamed.step(ids)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_says_what_streaming_needs(
    tiny: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"accelerate(.|\n)*prune-export\[heal\]"):
        PyTorch().open(tiny, replace(machine, ram_bytes=100_000))


def test_engine_round_trips(tiny: Path) -> None:
    engine = Engine.pytorch(tiny, weight_bytes=12, logits="last")
    assert Engine.from_json(engine.to_json()) == engine


def test_engine_names_an_unknown_parameter(tiny: Path, machine: Machine) -> None:
    with pytest.raises(VerifyError, match=r"precision(.|\n)*float8"):
        Engine.pytorch(tiny, precision="float8").open(machine)


def test_engine_of_an_unknown_exporter(tiny: Path, machine: Machine) -> None:
    with pytest.raises(PlanError, match="nothing is registered as `onyx`"):
        Engine("onyx", tiny).open(machine)
