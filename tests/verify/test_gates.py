"""Gates: what is claimed must be reached by the lower end, and above 1 be a claim at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prune_export.errors import VerifyError
from prune_export.recipe.stages import Workload
from prune_export.verify.gates import perplexity_gates, placement_gates, speed_gates
from prune_export.verify.results import Perplexity, Placed, Speed

SPEED = Speed(
    engine="onnx",
    workload=Workload(1, 512, 128),
    phase="decode",
    dense_seconds=[0.05],
    pruned_seconds=[0.03],
    ratio=1.5,
    low=1.41,
    high=1.6,
    floor_low=0.98,
    floor_high=1.02,
    bound=1.46,
    verdict="faster",
    dense_tokens_per_second=20.0,
    pruned_tokens_per_second=30.0,
)


def test_the_lower_end_must_reach_the_claim() -> None:
    [gate] = speed_gates([SPEED], 1.4)
    assert gate.ok
    assert gate.what == "decode speedup of onnx at batch 1, 512 + 128 tokens"
    assert (gate.claimed, gate.measured) == (1.4, 1.41)
    [gate] = speed_gates([SPEED], 1.45)
    assert not gate.ok


def test_a_claim_needs_the_verdict() -> None:
    """An interval just above 1 but inside of the floor is no speedup."""
    inside = replace(SPEED, ratio=1.03, low=1.01, high=1.05, verdict="no speedup")
    assert not speed_gates([inside], 1.005)[0].ok
    assert speed_gates([inside], 0.95)[0].ok


def test_gates_are_about_one_phase() -> None:
    prefill = replace(SPEED, phase="prefill", low=1.0)
    assert [gate.ok for gate in speed_gates([SPEED, prefill], 1.4, "decode")] == [True]
    assert [gate.ok for gate in speed_gates([SPEED, prefill], 1.4, "prefill")] == [False]
    assert speed_gates([SPEED], None) == []


def test_perplexity_is_relative_to_dense() -> None:
    measured = [
        Perplexity("dense", 10.0, 1, 4, 3, [2.3]),
        Perplexity("pruned", 30.0, 1, 4, 3, [3.4]),
        Perplexity("healed", 12.0, 1, 4, 3, [2.5]),
    ]
    [gate] = perplexity_gates(measured, "healed", 1.25)
    assert gate.ok
    assert gate.measured == pytest.approx(1.2)
    assert not perplexity_gates(measured, "pruned", 1.25)[0].ok
    with pytest.raises(VerifyError, match="absent was not measured"):
        perplexity_gates(measured, "absent", 1.25)


def test_nodes_that_ran_elsewhere_are_a_gate_that_fails() -> None:
    whole = Placed("onnx", "CPUExecutionProvider", {"CPUExecutionProvider": 9})
    stray = replace(whole, asked="CUDAExecutionProvider", strayed=["a", "b"])
    (gate,) = placement_gates([whole, stray])
    assert (gate.what, gate.claimed, gate.measured, gate.ok) == (
        "nodes of onnx not run by CUDAExecutionProvider", 0, 2, False,
    )  # fmt: skip
