"""Healing by distillation: what the objective does, what it resumes to, and what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.calibrate import TokenSet
from prune_export.contracts import HealRecord, Taught
from prune_export.errors import StageError
from prune_export.heal.full import Full
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.machine import Machine
from prune_export.recipe.stages import Stage
from prune_export.store import Key
from prune_export.training.losses.objective import Distill, Distilled
from prune_export.training.memory import answers_to_keep
from prune_export.training.settings import Training
from prune_export.units import GIB
from tests.arch.tiny_models import arch_of
from tests.heal.conftest import QUICK, save_tiny, windows
from tests.killed import Killed, killed_at
from tests.saved_models import contents
from tests.training.test_memory import CPU, SMOLLM2_24

Heal = Callable[..., tuple[HealRecord, Path]]


def how(**keys: Any) -> Distilled:
    return Distilled(distill=Distill(**keys))


def full(**keys: Any) -> Full:
    body = {"steps": 8, "batch": 4, "compute_dtype": "float32", "learning_rate": 5e-3} | keys
    return Full(**body)


def divergence(one: Path, teacher: Path, ids: torch.Tensor) -> float:
    """KL(teacher, one) a token."""
    with torch.no_grad():
        log_q, log_p = (
            AutoModelForCausalLM.from_pretrained(path)(ids).logits[:, :-1].log_softmax(-1)
            for path in (one, teacher)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("divergences", ["forward_kl", "reverse_kl", "jsd"])
def test_the_student_comes_nearer_to_its_teacher(
    divergences: Any, tmp_path: Path, heal: Heal
) -> None:
    """On windows that it has not seen, and though they are noise of which nothing can be learnt."""
    source = save_tiny(tmp_path / "model", "llama")
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    noise = torch.randint(0, 64, (40, 16), generator=torch.Generator().manual_seed(0))
    healer = full(steps=25, objective=how(divergence=divergences, cache="live"))
    record, out = heal(healer, source, tokens=TokenSet.of(noise), teacher=teacher)
    unseen = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
    before, after = (divergence(path, teacher, unseen) for path in (source, out))
    assert after < 0.6 * before
    assert record.log["training"]["objective"]["distill"]["divergence"] == divergences


def test_all_tokens_kept_train_as_the_teacher_beside_does(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    logs, weights = [], []
    for cache in ("live", 64, 63):
        record, out = heal(full(objective=how(cache=cache)), source, teacher=teacher)
        logs.append([row[1] for row in record.log["loss"]])
        weights.append(load_file(out / "model.safetensors"))
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-5)
    # One token with all others is that token: 63 of 64 and the rest say as much.
    assert logs[2] == pytest.approx(logs[0], rel=1e-4)


def test_a_teacher_that_is_the_student_teaches_nothing(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    for cache in ("live", 8):
        record, _ = heal(full(steps=1, objective=how(cache=cache)), source, teacher=source)
        assert 0 <= record.log["loss"][0][1] < 1e-6


def test_only_what_counts_is_learnt_from(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    teacher = save_tiny(tmp_path / "teacher", "llama", num_hidden_layers=4)
    ids = windows().ids
    counted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    counted[:, 5] = True
    first = []
    for cache, micro in (("live", 1), (64, 4)):
        healer = full(steps=1, micro_batch=micro, objective=how(cache=cache))
        marked = TokenSet.of(ids, counted=counted)
        record, _ = heal(healer, source, tokens=marked, teacher=teacher)
        first.append(record.log["loss"][0][1])
    everything, _ = heal(full(steps=1, objective=how(cache="live")), source, teacher=teacher)
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    assert everything.log["loss"][0][1] != pytest.approx(first[0], rel=1e-3)


@pytest.mark.parametrize(
    "healer",
    [
        Lora(**QUICK | {"steps": 9}, save_every=2, objective=how(cache="live")),
        Qlora(**QUICK | {"steps": 9}, save_every=2, objective=how(cache=8)),
        full(steps=9, save_every=2),
        full(steps=9, save_every=2, objective=how(cache=8, temperature=2.0, cross_entropy=0.2)),
    ],
    ids=["lora beside", "qlora kept", "full", "full kept"],
)
def test_stopped_at_several_steps_ends_in_the_same_bytes(
    healer: Training, tmp_path: Path, heal: Heal
) -> None:
    source = save_tiny(tmp_path / "model", "gpt2")
    teacher = save_tiny(tmp_path / "teacher", "gpt2", num_hidden_layers=4)
    unbroken, expected = heal(healer, source, teacher=teacher)
    scratch = tmp_path / "scratch"
    for step in (3, 8, 9):
        with pytest.raises(Killed):
            heal(healer, source, teacher=teacher, scratch=scratch, progress=killed_at(step))
    record, out = heal(healer, source, teacher=teacher, scratch=scratch)
    assert contents(out) == contents(expected)
    assert record.log == unbroken.log


def test_another_teacher_does_not_go_on_from_this_run(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    one = save_tiny(tmp_path / "one", "llama", num_hidden_layers=4)
    other = save_tiny(tmp_path / "other", "llama", num_hidden_layers=2)
    healer, scratch = full(save_every=1, objective=how(cache="live")), tmp_path / "scratch"
    with pytest.raises(Killed):
        heal(healer, source, teacher=one, scratch=scratch, progress=killed_at(5))
    _, out = heal(healer, source, teacher=other, scratch=scratch)
    _, fresh = heal(healer, source, teacher=other)
    assert contents(out) == contents(fresh)


def test_without_a_teacher_it_says_so(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    with pytest.raises(StageError, match="no teacher was given"):
        heal(full(objective="distill"), source)


def test_bfloat16_compute_keeps_float32_weights(tmp_path: Path, heal: Heal) -> None:
    """A learning rate at which bfloat16 weights would not move at all."""
    source = save_tiny(tmp_path / "model", "llama")
    healer = full(compute_dtype="bfloat16", learning_rate=1e-6, gradient_checkpointing=True)
    record, out = heal(healer, source)
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    name = "model.layers.1.mlp.up_proj.weight"
    assert 0 < float((before[name] - after[name]).abs().max()) < 1e-4
    assert record.log["training"]["compute_dtype"] == "bfloat16"


# --- keys, ids, plan


OLD: dict[str, tuple[Any, str]] = {
    "lora": (Lora(), "heal-lora-fbd8e6c00236d8687f23ae41"),
    "qlora": (
        Qlora(rank=16, targets="all", dropout=0, steps=130, batch=2, learning_rate=2e-3),
        "heal-qlora-afbcfbf23e2d9aa37ef92d8c",
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_what_was_healed_before_keeps_its_id(name: str) -> None:
    """Ids as they were before there was an `objective`, which is not in them by default."""
    healer, expected = OLD[name]
    stage = Stage("heal", name, healer, "healing")
    # Of that version; since then the bytes have changed.
    key = Key("heal", name, "2", stage.parameters(), ("model-0",), "f")
    assert key.id == expected
    said = replace(healer, objective="next_token")
    assert Stage("heal", name, said, "healing").parameters() == stage.parameters()
    assert "objective" not in healer.described()


def test_ways_to_write_the_objective() -> None:
    read = TypeAdapter(Lora).validate_python
    plain: list[Any] = ["distill", {"distill": {}}, {"distill": None}]
    made = [read({"objective": one}) for one in plain]
    assert made[0] == made[1] == made[2]
    assert made[0].distill == Distill()
    assert Lora(objective="distill").distill == Distill()
    assert read({}).distill is None
    jsd = {"cache": 64, "divergence": "jsd", "beta": 0.1}
    assert read({"objective": {"distill": jsd}}).distill.cache == 64


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ("kl", "'next_token' or 'distill'"),
        ({"distil": {}}, "Extra inputs"),
        ({"distill": {"temprature": 1}}, "Extra inputs"),
        ({"distill": {"temperature": 0}}, "greater than 0"),
        ({"distill": {"temperature": float("inf")}}, "finite"),
        ({"distill": {"beta": 1.5}}, "less than or equal to 1"),
        ({"distill": {"divergence": "kl"}}, "'forward_kl', 'reverse_kl' or 'jsd'"),
        ({"distill": {"cache": 0}}, "greater than or equal to 1"),
        ({"distill": {"teacher": ""}}, "at least 1 character"),
        (3, "valid dictionary"),
    ],
)
def test_objectives_that_are_none_are_refused(objective: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Lora).validate_python({"objective": objective})


def test_all_three_are_found_and_may_be_taught() -> None:
    for name in ("full", "lora", "qlora"):
        healer = registry.find("heal", name)()
        assert isinstance(healer, Taught)
        assert (healer.taught, healer.teacher) == (False, None)
        assert replace(healer, objective=how(teacher="a/b")).teacher == "a/b"


def test_where_it_is_left_to_us_what_costs_less_is_taken() -> None:
    arch = arch_of("llama", **SMOLLM2_24)
    dense = arch_of("llama", **SMOLLM2_24 | {"num_hidden_layers": 30})
    healer = Lora(rank=8, steps=100, batch=2, objective="distill", compute_dtype="float32")

    def kept(samples: int, gib: float = 64, **keys: Any) -> int | None:
        machine = Machine("cpu", int(gib * GIB), 0, 2)
        taught = replace(healer, **keys)
        return answers_to_keep(arch, dense, taught, None, machine, samples, 512)

    assert kept(1000) is None  # 200 windows are seen, and 1,000 would be kept
    assert kept(150) == 128
    assert kept(1000, gib=3.0) == 128  # with the teacher, activations would be recomputed
    assert kept(1000, objective=how(cache=7)) == 7
    assert kept(1000, objective=how(cache=10**9)) == 49152
    assert kept(10, objective=how(cache="live")) is None


def test_costs_of_teaching_and_of_training_all_weights() -> None:
    arch = arch_of("llama", **SMOLLM2_24)
    dense = arch_of("llama", **SMOLLM2_24 | {"num_hidden_layers": 30})
    keys: dict[str, Any] = {
        "steps": 100, "batch": 2, "micro_batch": 1, "gradient_checkpointing": False,
        "compute_dtype": "float32", "keep_zeros": False,
    }  # fmt: skip
    alone = Lora(rank=8, **keys).cost(arch, 0, 512, CPU)
    beside = Lora(rank=8, **keys, objective=how(cache="live"))
    taught, note = beside.taught_cost(arch, dense, 400, 512, CPU)
    assert taught.ram_bytes - alone.ram_bytes == 4 * dense.parameters()
    assert "beside" in note
    forward = 2 * (dense.block_parameters() + dense.head_parameters()) + 2 * 30 * 512 * 576
    assert taught.flops - alone.flops == pytest.approx(100 * 2 * 512 * forward)
    taught, note = replace(beside, objective=how(cache=64)).taught_cost(arch, dense, 400, 512, CPU)
    assert "64 tokens, 388 bytes a position" in note
    assert taught.disk_bytes - alone.disk_bytes == 400 * 511 * 388
    assert taught.ram_bytes < alone.ram_bytes + 1.5 * GIB
    whole = Full(**keys).cost(arch, 0, 512, CPU)
    trained = 24 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576) + 576
    # Gradient and AdamW's two moments; the adapters it has none of; no copies of their inputs.
    assert whole.ram_bytes > alone.ram_bytes
    assert whole.disk_bytes == 4 * arch.parameters() + 2 * 12 * trained
    everything = Full(**keys, train_embeddings=True).cost(arch, 0, 512, CPU)
    assert everything.ram_bytes - whole.ram_bytes == 12 * 49152 * 576
