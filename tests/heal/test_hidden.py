"""Hidden states of a student beside its teacher's, by surviving block or by the last but one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord, Teacher, Work
from prune_export.errors import StageError
from prune_export.progress import Silent
from prune_export.surgery import Drop, rewrite
from prune_export.training.losses.hidden import States, paired, watched
from prune_export.training.losses.objective import Hidden
from tests.heal.conftest import MACHINE, save_tiny, windows
from tests.heal.test_distill import full, how
from tests.killed import Killed, killed_at
from tests.saved_models import contents

Heal = Callable[..., tuple[HealRecord, Path]]


def test_blocks_are_paired_by_what_they_were() -> None:
    assert paired(Hidden(), 3, 5, (0, 1, 4)) == ((0, 0), (1, 1), (2, 4))
    assert paired(Hidden(by="last_2"), 3, 5, None) == ((1, 3),)
    for survived in (None, (0, 1)):
        with pytest.raises(StageError, match="which of the teacher's blocks"):
            paired(Hidden(), 3, 5, survived)


def test_distances_are_those_by_hand() -> None:
    states = States(Hidden(weight=3.0), ((0, 0),))
    own = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [9.0, 9.0]]])
    wanted = torch.tensor([[[0.0, 1.0], [2.0, 1.0], [1.0, 1.0]]])
    ids = torch.tensor([[1, 2, 3]])

    def distance(loss: str, counted: torch.Tensor | None = None) -> float:
        states.how = Hidden(weight=3.0, loss=loss)  # type: ignore[arg-type]
        states.student[0], states.teacher[0] = own, wanted
        return float(states.loss(ids, counted))

    assert distance("mse") == pytest.approx(3 * (2 / 1 + 1 / 5) / 2)
    assert distance("cosine") == pytest.approx(3 * (1 + 1 - 6 / 40**0.5) / 2)
    counted = torch.tensor([[False, False, True]])
    assert distance("mse", counted) == pytest.approx(3 * 1 / 5)


def work_of(
    teacher: Path, scratch: Path, blocks: tuple[int, ...] | None, progress: Any = None
) -> Work:
    def none(outcomes: int, temperature: float) -> Path:
        raise AssertionError

    return Work(MACHINE, progress or Silent(), scratch, teacher=Teacher(teacher, "t", none, blocks))


def dropped(source: Path, to: Path, blocks: tuple[int, ...]) -> Path:
    opened = Checkpoint.open(source)
    rewrite(opened, opened.arch(), [Drop(blocks)], to, ram_bytes=1 << 30)
    return to


def apart(one: Path, teacher: Path, pairs: tuple[tuple[int, int], ...]) -> float:
    """The mean relative distance of states that leave blocks."""
    ids = windows(samples=4).ids
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (one, teacher)]
    blocks = [list(model.model.layers) for model in models]
    survived = tuple(other for _, other in pairs)
    with watched(
        Hidden(), blocks[0], blocks[1], (32, 32), survived, seed=0, device="cpu"
    ) as states, torch.no_grad():  # fmt: skip
        for model in models:
            model(ids)
        return float(states.loss(ids, None))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_come_nearer_to_the_teachers(checkpointing: bool, tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=5, hidden_size=32)
    source = dropped(teacher, tmp_path / "model", (2, 3))
    pairs = ((0, 0), (1, 1), (2, 4))
    after = []
    for weight in (None, 5.0):
        keys: dict[str, Any] = (
            {"cache": "live"} if weight is None else {"hidden": {"weight": weight}}
        )
        healer = full(steps=15, gradient_checkpointing=checkpointing, objective=how(**keys))
        out = tmp_path / f"out-{weight}"
        work = work_of(teacher, tmp_path / f"scratch-{weight}", (0, 1, 4))
        record = healer.heal(source, windows(), out, work)
        after.append(apart(out, teacher, pairs))
    assert after[1] < 0.9 * after[0]
    assert record.log["training"]["objective"]["distill"]["hidden"]["by"] == "surviving"
    assert record.log["held_out"]["loss"]["teacher"] > 0


def test_without_knowing_the_blocks_it_says_so(tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    source = dropped(teacher, tmp_path / "model", (2,))
    with pytest.raises(StageError, match="last_2"):
        full(objective=how(hidden={})).heal(
            source, windows(), tmp_path / "out", work_of(teacher, tmp_path / "scratch", None)
        )


def test_a_narrower_student_learns_a_map_too_and_resumes_with_it(
    tmp_path: Path, heal: Heal
) -> None:
    source = save_tiny(tmp_path / "model", "llama", hidden_size=16)
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4, hidden_size=32)
    healer = full(
        steps=8, save_every=2,
        objective=how(hidden={"by": "last_2", "loss": "cosine", "weight": 2.0}),
    )  # fmt: skip
    unbroken, expected = heal(healer, source, teacher=teacher)
    scratch = tmp_path / "scratch"
    for step in (3, 7):
        with pytest.raises(Killed):
            heal(healer, source, teacher=teacher, scratch=scratch, progress=killed_at(step))
    record, out = heal(healer, source, teacher=teacher, scratch=scratch)
    assert contents(out) == contents(expected)
    assert record.log == unbroken.log
    losses = [row[1] for row in record.log["loss"]]
    assert losses[-1] < losses[0]
    assert not any("map" in name for name in Checkpoint.open(out).entries)
