"""Damaged inputs end in a result or in three lines of ours: seeded, the same ones in every run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from doors import DOORS
from mutate import run

EACH = 100


@pytest.mark.parametrize("door", DOORS, ids=[door.name for door in DOORS])
def test_damaged_inputs_are_refused_in_our_own_words(door, tmp_path):  # type: ignore[no-untyped-def]
    found = run([door], EACH, seed=18, folder=tmp_path)
    assert found.tried == EACH
    assert not found.faults, "\n\n".join(f"{k}\n{v}" for k, v in found.faults.items())
    assert found.refused or door.name == "card"


def test_there_are_enough_of_them() -> None:
    assert len(DOORS) * EACH >= 2000
