from pathlib import Path

import numpy as np
import pytest

from prune_export.errors import VerifyError
from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.parity import (
    TOLERANCES,
    _precision,
    deviation,
    greedy_agreement,
    judged,
    measure_parity,
)
from tests.verify.tiny_checkpoint import save_tiny


def test_deviation_by_hand() -> None:
    """p = (3/4, 1/4) against q = (1/2, 1/2), and once equal."""
    log = np.log(3.0)
    expected = np.array([[[log, 0.0], [1.0, 1.0]]], dtype=np.float32)
    got = np.array([[[0.0, 0.0], [2.0, 2.0]]], dtype=np.float32)
    error, kl = deviation(expected, got)
    assert error == pytest.approx(log)
    one = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    assert kl == pytest.approx((one + 0) / 2)


def test_deviation_refuses_nan() -> None:
    with pytest.raises(VerifyError, match="not finite"):
        deviation(np.zeros((1, 1, 2)), np.array([[[0.0, np.nan]]]))


def test_agreement_by_hand() -> None:
    """Equal; a tie, 0.1 below the largest; and another token, 2 below."""
    taught = np.array([[1.0, 0.0, 0.0], [1.0, 0.9, 0.0], [3.0, 0.0, 1.0]])
    said = np.array([[5.0, 0.0, 0.0], [1.0, 1.1, 0.0], [0.0, 0.0, 1.0]])
    assert greedy_agreement(taught, said, tied_within=0.2) == (1, 1)
    assert greedy_agreement(taught, said, tied_within=0.05) == (1, 0)


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_same_checkpoint_is_equal(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    """Also where the engine returns the last position's logits only."""
    engine = Engine.pytorch(tiny, logits="last")
    found = measure_parity(engine, Engine.pytorch(tiny), ids, machine, precision="fp32")
    assert found.ok
    assert found.greedy_equal == found.greedy_total == 64
    assert found.max_logit_error < found.tolerance < 0.1


@pytest.mark.parametrize(
    ("noise", "passes"),
    [
        (1e-4, ["fp32", "fp16", "bf16", "int8", "int8 activations", "fp8", "int4"]),
        (1e-2, ["fp16", "bf16", "int8", "int8 activations", "fp8", "int4"]),
        (0.15, ["bf16", "int8", "int8 activations", "fp8", "int4"]),
        (0.4, ["int8", "int8 activations", "fp8", "int4"]),
        (0.9, ["int8 activations", "fp8", "int4"]),
    ],
)
def test_tolerance_by_precision(noise: float, passes: list[str]) -> None:
    """Logits of standard deviation 1 with an error; greedy tokens only differ by ties."""
    random = np.random.default_rng(0)
    expected = random.normal(size=(2, 20, 500)).astype(np.float32)
    error = noise * random.uniform(-1, 1, expected.shape).astype(np.float32)
    got = expected + error
    found = {
        precision: judged("onnx", precision, expected, got, expected[0], got[0])
        for precision in TOLERANCES
    }
    assert [precision for precision, parity in found.items() if parity.ok] == passes
    assert found["int4"].tolerance == 0


def test_int8_of_weights_alone_is_held_to_more() -> None:
    """Rounded activations cost SmolLM2-135M 0.13 nats."""
    found = {
        exporter: _precision(Engine(exporter, Path("none"), {"precision": "int8"}))
        for exporter in ("onnx", "tensorrt")
    }
    assert found == {"onnx": "int8", "tensorrt": "int8 activations"}


def test_a_wrong_token_fails_although_logits_are_close() -> None:
    """A cache that is wrong in its later steps, behind windows that are right."""
    expected = np.random.default_rng(0).normal(size=(1, 4, 50)).astype(np.float32)
    found = judged("onnx", "fp32", expected, expected, expected[0], expected[0, ::-1])
    assert found.max_logit_error == 0
    assert found.greedy_equal == 0
    assert not found.ok


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_another_checkpoint_is_not(
    tiny: Path, other: Path, machine: Machine, ids: np.ndarray
) -> None:
    engine = Engine.pytorch(other)
    found = measure_parity(engine, Engine.pytorch(tiny), ids, machine, precision="int8")
    assert not found.ok
    assert found.mean_kl > 0.05
    assert found.greedy_equal < 64


@pytest.mark.usefixtures("measured_here")
@pytest.mark.slow
@pytest.mark.timeout(1800)  # many processes: minutes where a machine is crowded
def test_other_vocabulary_is_refused(tmp_path: Path, tiny: Path, machine: Machine) -> None:
    small = save_tiny(tmp_path / "small", vocab=260)
    ids = np.arange(40)[None]
    with pytest.raises(VerifyError, match="not made from this checkpoint"):
        measure_parity(Engine.pytorch(small), Engine.pytorch(tiny), ids, machine, precision="fp32")


def test_short_windows_are_refused(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    engine = Engine.pytorch(tiny)
    with pytest.raises(VerifyError, match="more than 16 tokens"):
        measure_parity(engine, engine, ids[:, :16], machine, precision="fp32")


def test_unknown_precision_is_refused(tiny: Path, machine: Machine, ids: np.ndarray) -> None:
    engine = Engine("onnx", tiny, {"precision": "fp5"})
    with pytest.raises(VerifyError, match="fp5"):
        measure_parity(engine, Engine.pytorch(tiny), ids, machine)
