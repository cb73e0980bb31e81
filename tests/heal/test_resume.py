"""A run that was killed goes on, and ends in the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from prune_export.contracts import HealRecord
from prune_export.heal.full import Full
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.training.loop import _Pause
from prune_export.training.settings import Training
from prune_export.training.state import State
from tests.heal.conftest import QUICK, save_tiny
from tests.killed import Killed, killed_at
from tests.saved_models import contents

Heal = Callable[..., tuple[HealRecord, Path]]
NARROW: dict[str, Any] = {
    "steps": 20, "batch": 4, "learning_rate": 1e-3, "compute_dtype": "bfloat16",
}  # fmt: skip
HEALERS: dict[str, Training] = {
    "lora": Lora(**QUICK | {"steps": 20}, save_every=3),
    "qlora": Qlora(**QUICK | {"steps": 20}, save_every=3),
    "lora bfloat16": Lora(**NARROW, rank=4, save_every=3),
    "full bfloat16": Full(**NARROW, save_every=3),
    "qlora quantized": Qlora(**QUICK | {"steps": 20}, save_every=3, merge_into="quantized_base"),
}


@pytest.mark.parametrize("name", HEALERS)
def test_stopped_at_several_steps_ends_in_the_same_bytes(
    name: str, tmp_path: Path, heal: Heal
) -> None:
    # GPT-2 has dropout of its own: the base model draws random numbers too.
    source = save_tiny(tmp_path / "model", "gpt2")
    unbroken, expected = heal(HEALERS[name], source)
    scratch = tmp_path / "scratch"
    for step in (2, 7, 8, 19, 20):
        with pytest.raises(Killed):
            heal(HEALERS[name], source, scratch=scratch, progress=killed_at(step))
    record, out = heal(HEALERS[name], source, scratch=scratch)
    assert contents(out) == contents(expected)
    assert record.log == unbroken.log


def test_saving_more_often_changes_nothing(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    _, often = heal(Lora(**QUICK, save_every=1), source)
    _, once = heal(Lora(**QUICK, save_every=100), source)
    assert contents(often) == contents(once)


def test_other_settings_do_not_go_on_from_this_run(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    scratch = tmp_path / "scratch"
    with pytest.raises(Killed):
        heal(Lora(**QUICK, seed=1, save_every=1), source, scratch=scratch, progress=killed_at(6))
    _, out = heal(Lora(**QUICK), source, scratch=scratch)
    _, fresh = heal(Lora(**QUICK), source)
    assert contents(out) == contents(fresh)


SCRIPT = """
import sys
from pathlib import Path
from prune_export.contracts import Work
from prune_export.progress import Silent
from tests.heal.conftest import MACHINE, windows
from tests.heal.test_resume import HEALERS

source, out, scratch, name = sys.argv[1:]
HEALERS[name].heal(Path(source), windows(), Path(out), Work(MACHINE, Silent(), Path(scratch)))
"""


def started(source: Path, out: Path, scratch: Path, name: str) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(out), str(scratch), name],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def step_of(scratch: Path) -> int:
    """The step that is saved, whoever saved it."""
    try:
        with safe_open(scratch / "training.safetensors", framework="pt") as file:
            import json

            return int(json.loads(file.metadata()["prune_export.training"])["step"])
    except OSError:
        return State().step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_killed_by_the_system_ends_in_the_same_bytes(name: str, tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    _, expected = heal(HEALERS[name], source)
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    seen = []
    for least in (1, 9):
        process = started(source, out, scratch, name)
        while process.poll() is None and step_of(scratch) < least:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stdout and process.stdout.read().decode()
        process.communicate()
        seen.append(step_of(scratch))
    assert 0 < seen[0] < 20
    assert not (out / "config.json").exists()
    process = started(source, out, scratch, name)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()
    assert output == b""
    assert contents(out) == contents(expected)


def test_saves_are_counted_in_steps_or_spaced_in_time() -> None:
    by_step = _Pause(3, 0.0)
    assert [step for step in range(1, 10) if by_step.over(step, 0.0)] == [3, 6, 9]
    by_time = _Pause(None, 100.0)
    assert not by_time.over(5, 129.0)
    assert by_time.over(5, 130.0)
    slow = by_time.after(130.0, 132.0)  # a save that took 2 s
    assert not slow.over(6, 231.0)
    assert slow.over(6, 232.0)
