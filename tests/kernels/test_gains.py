"""What zeros can gain: bounded by bytes, and by what a core takes apart."""

from __future__ import annotations

import pytest

from prune_export.kernels.gains import bytes_a_weight, core_rate, gain, instructions_of


def test_bytes_are_those_of_the_format() -> None:
    assert bytes_a_weight("int8", 128, 0.0) == 1 + 4 / 128
    assert bytes_a_weight("int8", 128, 0.5) == 0.5 + 1 / 8 + 4 / 128
    assert bytes_a_weight("int4", 128, 0.1) == 0.5 + 4 / 128  # a bitmap would be larger
    assert bytes_a_weight("bf16", 32, 0.75) == 0.5 + 1 / 8


def test_a_core_with_little_bandwidth_gains_what_bytes_say() -> None:
    slow = gain("int8", 128, 0.5, 10e9, "avx512")
    assert slow.here == pytest.approx(slow.by_bytes)
    fast = gain("int8", 128, 0.5, 60e9, "avx512")
    assert fast.here == pytest.approx(50 / 58)
    assert "here about 0.86x" in fast.note()


def test_plain_loops_gain_nothing() -> None:
    assert gain("int8", 128, 0.9, 10e9, "portable").here < 0.1


def test_a_processor_is_known_by_its_features() -> None:
    assert instructions_of(("sse4_2", "neon")) == "portable"
    assert instructions_of(("avx2", "fma", "avx512f")) == "avx2"
    full = ("avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vnni", "avx2", "fma")
    assert instructions_of(full) == "avx512"


def test_memory_has_a_rate() -> None:
    assert 1e8 < core_rate(1) < 1e12
