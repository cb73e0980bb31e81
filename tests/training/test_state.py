from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prune_export.training.state import State

SAVED = State(
    step=3,
    tensors={"a": torch.randn(2, 3), "a|mean": torch.ones(2, 3)},
    losses=((1, 0.1 + 0.2, 3e-4), (2, 1 / 3, 1e-4)),
    held_out={"before": 2.5},
    seconds=1.5,
)


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    SAVED.save(tmp_path, "key")
    found = State.load(tmp_path, "key")
    assert (found.step, found.losses, found.held_out, found.seconds) == (
        3, SAVED.losses, {"before": 2.5}, 1.5,
    )  # fmt: skip
    assert set(found.tensors) == {"a", "a|mean"}
    assert torch.equal(found.tensors["a"], SAVED.tensors["a"])


def test_another_key_starts_afresh(tmp_path: Path) -> None:
    SAVED.save(tmp_path, "key")
    assert State.load(tmp_path, "other") == State()
    assert State.load(tmp_path / "nowhere", "key") == State()


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_a_broken_file_starts_afresh(tmp_path: Path, left: int) -> None:
    SAVED.save(tmp_path, "key")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:left])
    assert State.load(tmp_path, "key") == State()


def test_an_interrupted_save_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SAVED.save(tmp_path, "key")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        State(step=4, tensors={"a": torch.zeros(1)}).save(tmp_path, "key")
    assert State.load(tmp_path, "key").step == 3
