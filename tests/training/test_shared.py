"""Two real processes heal together: the result of one, one writer, and what happens if one dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from prune_export.calibrate import TokenSet
from prune_export.contracts import Work
from prune_export.errors import PlanError
from prune_export.heal.full import Full
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.progress import Silent
from prune_export.system.processes import ALONE, Team, joined, shares, started_team
from prune_export.training.losses.objective import Distill, Distilled, Hidden
from tests.heal.conftest import MACHINE, save_tiny, teacher_at, windows

ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {
    "steps": 6, "batch": 4, "micro_batch": 1, "compute_dtype": "float32", "warmup": 0,
}  # fmt: skip
KEPT = Distilled(distill=Distill(cache=8))
HEALERS = {
    # Dropout and LayerDrop: what a micro-batch draws does not depend on who computes it.
    "lora": Lora(**SHORT, rank=2, learning_rate=1e-2, dropout=0.2, layerdrop=0.4),
    "qlora live": Qlora(
        **SHORT, rank=2, learning_rate=1e-2, objective=Distilled(distill=Distill(cache="live"))
    ),
    "full kept": Full(**SHORT, learning_rate=2e-3, objective=KEPT),
    "full on-policy": Full(
        **SHORT,
        learning_rate=2e-3,
        objective=Distilled(
            distill=Distill(on_policy=0.5, new_tokens=6, hidden=Hidden(by="last_2"))
        ),
    ),
    "long": Lora(**SHORT | {"steps": 100}, rank=2, learning_rate=1e-3, save_every=3),
}


def counted() -> TokenSet:
    """Windows of which not the same number of tokens counts, so that a mean of means is wrong."""
    ids = windows().ids
    marks = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    marks[::3, 4:] = False
    marks[:, 1] = True
    return TokenSet.of(ids, counted=marks)


def heal_here(name: str, place: Path, team: Team) -> Path:
    """Heals the model in `place`, keeping a teacher's answers where they are asked for."""
    out = place / f"{name}-out-{team.size}"
    tokens = counted()
    teacher = teacher_at(place / "dense", tokens, place / f"kept-{team.size}", team)
    work = Work(MACHINE, Silent(), place / f"{name}-scratch", teacher=teacher, team=team)
    HEALERS[name].heal(place / "model", tokens, out, work)
    return out


def main(place: str, *names: str) -> None:
    """What each process does."""
    with started_team() as team:
        if not team.leads:
            sys.exit(joined(team))
        for name in names:
            heal_here(name, Path(place), team)
        team.dismiss()


def start(number: int, size: int, port: int, command: list[str]) -> subprocess.Popen[str]:
    """Starts one of several processes, as torchrun does."""
    ours = {
        "RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT,
    }  # fmt: skip
    env = os.environ | {key: str(value) for key, value in ours.items()}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def two(place: Path, *names: str) -> list[subprocess.Popen[str]]:
    code = "import sys; from tests.training.test_shared import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(place), *names]
    port = free_port()
    return [start(number, 2, port, command) for number in range(2)]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ended(processes: list[subprocess.Popen[str]]) -> Iterator[tuple[int, str]]:
    for process in processes:
        _, errors = process.communicate(timeout=300)
        yield process.returncode, errors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    save_tiny(folder / "dense", "llama", tie_word_embeddings=True)
    save_tiny(folder / "model", "llama", tie_word_embeddings=True, num_hidden_layers=2)
    return folder


@pytest.mark.slow
def test_two_processes_heal_as_one_does(place: Path) -> None:
    names = ["lora", "qlora live", "full kept", "full on-policy"]
    processes = two(place, *names)
    for name in names:
        heal_here(name, place, ALONE)
    for status, errors in ended(processes):
        assert status == 0, errors
    for name in names:
        one, both = (place / f"{name}-out-{size}" for size in (1, 2))
        assert sorted(file.name for file in one.iterdir()) == sorted(
            file.name for file in both.iterdir()
        )
        ours, theirs = load_file(one / "model.safetensors"), load_file(both / "model.safetensors")
        source = load_file(place / "model" / "model.safetensors")
        moved = max(float((ours[key] - source[key]).abs().max()) for key in ours)
        apart = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
        assert moved > 1e-3
        assert apart < 1e-3 * moved, name
    # What the teacher said is the same to the last bit.
    kept = [file.read_bytes() for file in sorted(place.glob("kept-*/*/answers.safetensors"))]
    assert len(kept) == 2
    assert kept[0] == kept[1]


def step_of(scratch: Path) -> int:
    try:
        with safe_open(scratch / "training.safetensors", framework="pt") as file:
            return int(json.loads(file.metadata()["prune_export.training"])["step"])
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_is_killed_and_one_process_goes_on(place: Path, killed: int) -> None:
    scratch = place / "long-scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    processes = two(place, "long")
    while all(process.poll() is None for process in processes) and step_of(scratch) < 3:
        time.sleep(0.01)
    before = step_of(scratch)
    processes[killed].send_signal(signal.SIGKILL)
    (status, _), (other, errors) = sorted(ended(processes))
    assert status == -signal.SIGKILL
    assert other != 0
    said = f"process {2 - killed} of 2"
    assert re.search(rf"{said}(?s:.)*cannot go on: .*ended", errors), errors
    assert 3 <= before < 100
    assert not (place / "long-out-2" / "config.json").exists()
    if killed == 1:
        return
    reached = step_of(scratch)
    whole = heal_here("long", place, ALONE)  # goes on from there, alone
    assert 3 <= reached < 100
    resumed = load_file(whole / "model.safetensors")
    shutil.rmtree(scratch)
    shutil.rmtree(whole)
    unbroken = load_file(heal_here("long", place, ALONE) / "model.safetensors")
    for key, value in unbroken.items():
        torch.testing.assert_close(resumed[key], value, rtol=1e-3, atol=1e-4)


def test_windows_are_shared_in_whole_batches() -> None:
    assert [list(one) for one in shares(7, 2, 2)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [len(one) for one in shares(3, 4, 3)] == [0, 0, 3]
    for count, whole, size in ((100, 8, 3), (1, 1, 4), (17, 16, 2), (0, 4, 2)):
        cut = shares(count, whole, size)
        assert [item for one in cut for item in one] == list(range(count))
        assert all(one.start % whole == 0 for one in cut if one)


def test_alone_nothing_is_exchanged() -> None:
    tensor = torch.ones(3)
    ALONE.total([tensor])
    ALONE.share([tensor])
    ALONE.call(pytest.fail)
    ALONE.dismiss()
    assert ALONE.told(5) == 5
    assert ALONE.leads
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP.*whole model"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed.*whole model"),
        ("MASTER_ADDR", "", "WORLD_SIZE is 2, and MASTER_ADDR is not set"),
    ],
)
def test_launchers_that_cannot_be_followed_are_refused_once(
    variable: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, said in {**started, variable: value}.items():
        monkeypatch.setenv(name, said)
    with pytest.raises(PlanError, match=problem) as caught, started_team():
        pass
    assert "torchrun" in caught.value.fix
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"), started_team():
        pass


def test_one_process_under_a_launcher_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with started_team() as team:
        assert team == ALONE
