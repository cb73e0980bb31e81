"""Lottery tickets against a plain loop, and what must hold of masks, rewinding and resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.calibrate import ModelView, as_matrix, linears
from prune_export.errors import PlanError, StageError
from prune_export.machine import Machine
from prune_export.methods.sparse.iterative_magnitude import IterativeMagnitude
from prune_export.pruning.sparse import lottery_ticket
from prune_export.pruning.sparse.lottery_ticket import Schedule, _batch
from prune_export.sparsity.nm import Nm
from tests.arch.tiny_models import Tiny, random_model
from tests.killed import Killed, killed_after
from tests.views import view_of

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = (torch.arange(20)[:, None] * 5 + 3 * torch.arange(12)) % 60 + 2
QUICK: dict[str, Any] = {"rounds": 2, "steps": 4, "batch": 3, "learning_rate": 3e-3}


def made(method: IterativeMagnitude, view: ModelView) -> tuple[dict[str, torch.Tensor], Any]:
    decision = method.decide(view)
    return {edit.tensor: edit.value() for edit in decision.edits}, decision.log


def by_hand(tiny: Tiny, method: IterativeMagnitude) -> dict[str, torch.Tensor]:
    """The same in a plain loop over a plain model."""
    model = tiny.model.float().train()
    names = [tensor.name for tensor in linears(tiny.arch)]
    masks = {name: torch.ones_like(model.get_parameter(name)) for name in names}
    schedule = Schedule(method.steps, method.batch, method.learning_rate, method.seed)
    windows = IDS[len(IDS) // 10 :]

    def go(first: int, last: int) -> None:
        adam = torch.optim.AdamW(model.parameters(), lr=1.0)
        for step in range(first, last):
            adam.param_groups[0]["lr"] = schedule.rate(step)
            ids = _batch(windows, step, schedule)
            logits = model(ids, use_cache=False).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
            for name, mask in masks.items():
                model.get_parameter(name).grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            again()

    def again() -> None:
        for name, mask in masks.items():
            model.get_parameter(name).data.mul_(mask)

    go(0, method.rewind)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = sum(mask.numel() for mask in masks.values())
    for done in range(1, method.rounds + 1):
        go(method.rewind, method.steps)
        sizes = torch.cat(
            [(model.get_parameter(name).detach().abs() * masks[name]).flatten() for name in names]
        )
        share = 1 - (1 - method.sparsity) ** (done / method.rounds)
        limit = sizes.sort().values[int(round(share * total, 6))]
        for name in names:
            masks[name] = (model.get_parameter(name).detach().abs() >= limit).float() * masks[name]
        for name, p in model.named_parameters():
            p.data.copy_(start[name])
        again()
    go(method.rewind, method.steps)
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("rewind", [0, 1])
def test_it_is_the_plain_loop(rewind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lottery_ticket, "TOKENS", 24)  # two of three windows at once
    tiny = random_model("llama", {}, tmp_path / "model")
    method = IterativeMagnitude(sparsity=0.6, rewind=rewind, **QUICK)
    ours, log = made(method, view_of(tiny, IDS, tmp_path / "s"))
    theirs = by_hand(tiny, method)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(value == 0, theirs[name] == 0), name
    assert [row["sparsity"] for row in log["rounds"]] == pytest.approx(
        [0, 0, 1 - 0.4**0.5, 0.6], abs=1e-3
    )
    assert log["zeros"] == int(0.6 * log["weights"])


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"nm": Nm(2, 4)}])
def test_layouts_and_patterns(
    model_type: str, amount: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = random_model(model_type, {}, tmp_path / "model")
    capfd.readouterr()
    values, log = made(IterativeMagnitude(**amount, **QUICK), view_of(tiny, IDS, tmp_path / "s"))
    assert capfd.readouterr() == ("", "")
    zeros = 0
    for tensor in linears(tiny.arch):
        matrix = as_matrix(tensor, values[tensor.name])
        zeros += int((matrix == 0).sum())
        if "nm" in amount:
            assert bool(((matrix.reshape(-1, 4) != 0).sum(1) == 2).all())
    assert zeros == log["zeros"] == log["weights"] // 2
    assert log["rounds"][-1]["loss"] < log["rounds"][0]["loss_before_training"]


def test_training_lowers_the_loss_and_controls_keep_the_counts(tmp_path: Path) -> None:
    tiny = random_model("llama", {}, tmp_path / "model")
    method = IterativeMagnitude(sparsity=0.8, **QUICK | {"steps": 20})
    found = {}
    for control in ("none", "random_mask", "reinit"):
        view = view_of(tiny, IDS, tmp_path / control)
        found[control] = made(replace(method, control=control), view)
    losses = {control: log["rounds"][-1]["loss"] for control, (_, log) in found.items()}
    before = found["none"][1]["rounds"][0]["loss_before_training"]
    assert losses["none"] < losses["random_mask"] < before
    ticket, shuffled, drawn = (values for values, _ in found.values())
    for tensor in linears(tiny.arch):
        name = tensor.name
        assert int((ticket[name] == 0).sum()) == int((shuffled[name] == 0).sum())
        assert torch.equal(ticket[name] == 0, drawn[name] == 0)
        assert not torch.equal(ticket[name] == 0, shuffled[name] == 0)
    norm = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(ticket[norm], drawn[norm], atol=0.05)


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lottery_ticket, "_SAVE_SECONDS", -1.0)  # after each step
    tiny = random_model("gpt2", {}, tmp_path / "model")  # which has dropout
    method = IterativeMagnitude(sparsity=0.5, rewind=1, **QUICK)
    whole, log = made(method, view_of(tiny, IDS, tmp_path / "whole"))
    for steps in (0, 2, 3, 4):
        with pytest.raises(Killed):
            made(
                method, view_of(tiny, IDS, tmp_path / "parts", killed_after(steps + 1, single=True))
            )
    parts, again = made(method, view_of(tiny, IDS, tmp_path / "parts"))
    assert again == log
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


def test_what_cannot_be_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="before the last of 5"):
        IterativeMagnitude(sparsity=0.5, steps=5, rewind=5)
    with pytest.raises(PlanError, match="owl"):
        IterativeMagnitude(sparsity=0.5, allocation="owl")
    tiny = random_model("llama", {}, tmp_path / "model")
    view = view_of(tiny, IDS[:1], tmp_path)
    with pytest.raises(StageError, match="expected at least 2"):
        IterativeMagnitude(sparsity=0.5, **QUICK).decide(view)


def test_the_plan_counts_all_trainings_and_the_whole_model(tmp_path: Path) -> None:
    arch = random_model("llama", {}, tmp_path / "model").arch
    method = IterativeMagnitude(sparsity=0.5, rounds=3, steps=10, rewind=2)
    (further,) = method.statistics(arch)
    assert method.total_steps == 2 + 4 * 8
    assert replace(method, control="reinit").total_steps == 2 + 3 * 8 + 10
    assert further.forwards == 3 * method.total_steps
    assert further.ram_bytes > 16 * arch.parameters()
