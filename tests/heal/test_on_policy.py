"""On-policy distillation: what the student says, what counts of it, and what it resumes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import AutoModelForCausalLM

from prune_export.contracts import HealRecord
from prune_export.errors import PlanError
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.training.memory import answers_to_keep
from prune_export.training.on_policy import is_on_policy, said_by_student
from prune_export.training.settings import Training
from tests.heal.conftest import QUICK, save_tiny, windows
from tests.heal.test_distill import divergence, full, how
from tests.killed import Killed, killed_at
from tests.saved_models import contents
from tests.training.test_memory import CPU, SMOLLM2_24, arch_of

Heal = Callable[..., tuple[HealRecord, Path]]


def asked(**keys: Any) -> Training:
    return full(objective=how(**{"on_policy": 1.0, "new_tokens": 5} | keys))


def said(model: Any, batch: torch.Tensor, settings: Training, step: int = 0, rows: int = 4) -> Any:
    return said_by_student(model, batch, settings, step, rows=rows, device="cpu")


def test_the_student_goes_on_with_each_window(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", "llama")).train()
    batch = windows(samples=4).ids
    ids, marks = said(model, batch, asked())
    assert model.training
    assert torch.equal(ids[:, :11], batch[:, :11])
    assert not torch.equal(ids[:, 11:], batch[:, 11:])
    assert torch.equal(marks, (torch.arange(16) >= 11).expand(4, 16))
    # By two at a time, and in another step.
    assert torch.equal(said(model, batch, asked(), rows=1)[0], ids)
    assert not torch.equal(said(model, batch, asked(), step=1)[0], ids)
    assert not torch.equal(said(model, batch, replace(asked(), seed=1))[0], ids)


def test_without_a_temperature_it_says_what_generate_does(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", "gpt2")).eval()
    batch = windows(samples=3).ids
    ids, _ = said(model, batch, asked(sampling_temperature=0))
    given = batch[:, :11]
    expected = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=5, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ids, expected)


def test_after_the_end_nothing_counts(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "model", "llama")).eval()
    batch = windows(samples=4).ids
    free, _ = said(model, batch, asked())
    model.config.eos_token_id = int(free[0, 13])
    ids, marks = said(model, batch, asked())
    assert torch.equal(ids[0, :14], free[0, :14])
    assert (ids[0, 13:] == free[0, 13]).all()
    assert marks[0].nonzero().flatten().tolist() == [11, 12, 13]


def test_so_many_steps_are_on_policy() -> None:
    settings = full(steps=400, objective=how(on_policy=0.25, new_tokens=5))
    assert sum(is_on_policy(settings, step) for step in range(400)) in range(80, 121)
    assert not any(is_on_policy(full(objective="distill"), step) for step in range(20))
    assert all(is_on_policy(asked(), step) for step in range(20))


@pytest.mark.parametrize(
    "healer",
    [
        full(steps=7, save_every=2, objective=how(on_policy=0.5, new_tokens=6)),
        Lora(**QUICK | {"steps": 7}, save_every=2, layerdrop=0.3, gradient_checkpointing=True,
             objective=how(on_policy=1.0, new_tokens=6, divergence="reverse_kl")),
        Qlora(**QUICK | {"steps": 5}, save_every=2,
              objective=how(on_policy=0.7, new_tokens=6, divergence="jsd", beta=0.3)),
    ],
    ids=["full", "lora", "qlora"],
)  # fmt: skip
def test_stopped_in_the_midst_it_ends_in_the_same_bytes(
    healer: Training, tmp_path: Path, heal: Heal
) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    unbroken, expected = heal(healer, source, teacher=teacher)
    scratch = tmp_path / "scratch"
    for step in (3, 5):
        with pytest.raises(Killed):
            heal(healer, source, teacher=teacher, scratch=scratch, progress=killed_at(step))
    record, out = heal(healer, source, teacher=teacher, scratch=scratch)
    assert contents(out) == contents(expected)
    assert record.log == unbroken.log
    assert record.trained_tokens == unbroken.trained_tokens
    learnt = 4 * (15 if healer.distill and healer.distill.on_policy < 1 else 6)
    assert 0 < record.trained_tokens <= healer.steps * learnt


def test_what_it_says_comes_nearer_to_its_teacher(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    keys = {"on_policy": 1.0, "new_tokens": 12, "divergence": "reverse_kl"}
    _, out = heal(full(steps=25, objective=how(**keys)), source, teacher=teacher)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    unseen, _ = said(model, windows(samples=6).ids, asked(new_tokens=12), step=99)
    before, after = (divergence(path, teacher, unseen) for path in (source, out))
    assert after < 0.7 * before


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"on_policy": 0.5, "cache": 64}, "asks it about what the student says"),
        ({"on_policy": 1.5}, "less than or equal to 1"),
        ({"on_policy": 0.5, "new_tokens": 0}, "greater than 0"),
        ({"hidden": {}, "cache": 64}, "keeps no hidden states"),
        ({"hidden": {}, "teacher": "a/b"}, "blocks survive of the model"),
        ({"hidden": {"by": "seam"}}, "'surviving' or 'last_2'"),
    ],
)
def test_what_contradicts_itself_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Lora).validate_python({"objective": {"distill": keys}})


def test_the_plan_runs_the_teacher_beside_and_counts_what_is_said() -> None:
    arch = arch_of("llama", **SMOLLM2_24)
    dense = arch_of("llama", **SMOLLM2_24 | {"num_hidden_layers": 30})
    keys: dict[str, Any] = {"steps": 100, "batch": 2, "micro_batch": 1, "rank": 8}
    plain = Lora(**keys, objective=how(cache="live"))
    own = Lora(**keys, objective=how(on_policy=0.5, new_tokens=128))
    assert answers_to_keep(arch, dense, own, None, CPU, 10, 512) is None
    before, _ = plain.taught_cost(arch, dense, 400, 512, CPU)
    after, note = own.taught_cost(arch, dense, 400, 512, CPU)
    assert after.flops > before.flops
    assert after.seconds > before.seconds
    assert "50% of steps on-policy, 128 tokens" in note
    with pytest.raises(PlanError, match="begin with a prompt"):
        own.taught_cost(arch, dense, 400, 128, CPU)
    hidden = Lora(**keys, objective=how(hidden={}))
    cost, note = hidden.taught_cost(arch, dense, 400, 512, CPU)
    assert cost.ram_bytes - before.ram_bytes == 4 * 24 * 512 * 2 * 576
    assert "hidden states surviving" in note


def test_new_keys_are_in_no_id_by_default() -> None:
    said_ = how(cache=8).distill.model_dump(mode="json")
    assert said_.keys() == {
        "divergence", "beta", "temperature", "cross_entropy", "teacher", "cache",
    }  # fmt: skip
