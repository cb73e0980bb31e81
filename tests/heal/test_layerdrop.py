"""Blocks left out in training: which, how often, and that a killed run leaves out the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.arch.table import table_for, tables
from prune_export.contracts import HealRecord
from prune_export.errors import PlanError
from prune_export.heal.lora import Lora
from prune_export.training.layerdrop import left_out, skipped
from tests.heal.conftest import QUICK, save_tiny
from tests.killed import Killed, killed_at
from tests.saved_models import contents

Heal = Callable[..., tuple[HealRecord, Path]]


def test_blocks_are_left_out_with_the_probability_asked_for() -> None:
    drawn = [skipped(10, 0.3, seed) for seed in range(2000)]
    counts = torch.tensor([sum(block in one for one in drawn) for block in range(10)])
    assert float(counts.float().mean()) == pytest.approx(600, abs=15)
    assert int(counts.min()) > 500, "no block is spared"
    assert len(set(drawn)) > 500
    assert drawn[:50] == [skipped(10, 0.3, seed) for seed in range(50)]


def test_one_block_always_runs() -> None:
    assert all(len(skipped(3, 0.99, seed)) == 2 for seed in range(20))
    assert skipped(4, 0.0, 1) == frozenset()


@pytest.mark.parametrize("model_type", sorted(tables()))
def test_a_block_left_out_is_a_block_removed(model_type: str, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(path)
    parent, _, leaf = table_for(model_type).blocks.rpartition(".")
    blocks = list(model.get_submodule(table_for(model_type).blocks))
    seed = next(s for s in range(100) if skipped(3, 0.5, s) == {1})
    ids = torch.arange(24).reshape(2, 12)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in list(vars(module).items()):
            if key.endswith("dropout") and isinstance(value, float):
                setattr(module, key, 0.0)
    in_tuple = table_for(model_type).tuple_blocks
    with torch.no_grad(), left_out(model, blocks, 0.5, in_tuple=in_tuple):
        torch.manual_seed(seed)
        evaluated = model.eval()(ids, use_cache=False).logits
        torch.manual_seed(seed)
        trained = model.train()(ids, use_cache=False).logits
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, evaluated)
        setattr(model.get_submodule(parent), leaf, torch.nn.ModuleList([blocks[0], blocks[2]]))
        model.config.num_hidden_layers = 2
        for key in ("layer_types", "no_rope_layers"):
            if key in vars(model.config) and getattr(model.config, key):
                kept = getattr(model.config, key)
                setattr(model.config, key, [kept[0], kept[2]])
        torch.testing.assert_close(model(ids, use_cache=False).logits, trained)


def test_healing_with_layerdrop_trains_and_resumes_to_the_same_bytes(
    tmp_path: Path, heal: Heal
) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    healer = Lora(**QUICK | {"steps": 12, "dropout": 0.0}, layerdrop=0.4, save_every=2)
    record, expected = heal(healer, source)
    plain, without = heal(Lora(**QUICK | {"steps": 12, "dropout": 0.0}), source)
    assert contents(expected) != contents(without), "it changes the training"
    losses = [row[1] for row in record.log["loss"]]
    assert losses != [row[1] for row in plain.log["loss"]]
    held_out = record.log["held_out"]["loss"]
    assert held_out["trained"] < held_out["before"]
    scratch = tmp_path / "scratch"
    for step in (1, 5, 8):
        with pytest.raises(Killed):
            heal(healer, source, scratch=scratch, progress=killed_at(step))
    _, out = heal(healer, source, scratch=scratch)
    assert contents(out) == contents(expected)


def test_checkpointed_gradients_leave_out_the_same_blocks(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    keys: dict[str, Any] = QUICK | {"steps": 3, "dropout": 0.0, "layerdrop": 0.5}
    kept, _ = heal(Lora(**keys, gradient_checkpointing=False), source)
    again, _ = heal(Lora(**keys, gradient_checkpointing=True), source)
    losses = [[row[1] for row in record.log["loss"]] for record in (kept, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_share_out_of_bounds_is_refused() -> None:
    with pytest.raises(PlanError, match="layerdrop"):
        Lora(layerdrop=1.0)
