"""The memory of a step is that of all its processes together."""

from __future__ import annotations

import subprocess
import sys

import psutil

from prune_export.execution.memory import Peak, memory_watched

HOLDS = "held = bytearray(50_000_000); print(len(held), flush=True); input()"


def test_a_child_counts_while_it_lives() -> None:
    alone, beside = Peak(), Peak()
    alone.look()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        beside.look()
        child.communicate(b"\n")
    assert beside.ram_bytes > alone.ram_bytes + 45_000_000
    assert alone.ram_bytes >= 0.5 * psutil.Process().memory_info().rss


def test_nobody_looks_any_more_afterwards() -> None:
    with memory_watched() as peak:
        peak.look()
    assert peak.ram_bytes > 0
    assert peak.over.is_set()
