from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.arch.roles import CONTROLS
from prune_export.arch.table import tables
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.training.adapters.targets import (
    is_expert,
    linear_weights,
    stacks_experts,
    targets,
)
from prune_export.training.model import trainee
from tests.arch.tiny_models import arch_of
from tests.heal.conftest import MACHINE, save_tiny


@pytest.mark.parametrize(
    ("model_type", "ffn", "all_"),
    [
        ("llama", "gate up down", "q k v o gate up down"),
        ("gpt2", "up down", "qkv o up down"),
        ("phi3", "gate_up down", "qkv o gate_up down"),
        ("opt", "up down", "q k v o up down"),
    ],
)
def test_roles(model_type: str, ffn: str, all_: str) -> None:
    arch = arch_of(model_type)

    def roles(which: str | tuple[str, ...]) -> set[str]:
        return {tensor.role for tensor in targets(which, arch)}

    assert roles("ffn") == set(ffn.split())
    assert roles("all") == set(all_.split())
    assert roles(("o", "down")) == {"o", "down"}
    assert len(targets("ffn", arch)) == len(ffn.split()) * arch.layers


@pytest.mark.parametrize(
    ("model_type", "which", "says"),
    [
        ("llama", ("q", "gait"), "did you mean `gate`"),
        ("llama", ("norm.attn",), "no linear weight"),
        ("mixtral", "ffn", "write `targets: [q, k, v, o]`"),
        ("mixtral", "all", "experts"),
        ("mixtral", ("q", "expert.up"), "experts"),
        ("qwen3_moe", "all", "stacked"),
        ("gpt_oss", "all", "stacked"),
        ("granitemoeshared", "ffn", "stacked"),
    ],
)
def test_refusals_say_what_to_write(
    model_type: str, which: str | tuple[str, ...], says: str
) -> None:
    with pytest.raises(PlanError) as raised:
        Lora(targets=which).check(arch_of(model_type), MACHINE)
    assert says in str(raised.value)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss", "qwen2_moe"])
def test_all_but_experts_are_all_where_there_are_none(model_type: str) -> None:
    arch = arch_of(model_type)
    found = targets("all_but_experts", arch)
    assert found
    if model_type == "llama":
        assert found == targets("all", arch)
    else:
        assert found == tuple(one for one in linear_weights(arch) if not is_expert(one))
        assert "q" in {one.role for one in found}
    Lora(targets="all_but_experts").check(arch, MACHINE)


def test_experts_are_healed_by_attention_in_full_precision_only() -> None:
    arch = arch_of("mixtral")
    Lora(targets=("q", "v")).check(arch, MACHINE)
    with pytest.raises(PlanError, match="method: lora"):
        Qlora(targets=("q", "v")).check(arch, MACHINE)


def dense_types() -> list[str]:
    return sorted(name for name in tables() if not stacks_experts(arch_of(name)))


@pytest.mark.parametrize("model_type", dense_types())
def test_every_family_takes_adapters_on_all_its_linear_layers(
    model_type: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_tiny(tmp_path / "model", model_type))
    arch = source.arch()
    names = [tensor.name for tensor in targets("all", arch)]
    student = trainee(
        source, names, Lora(rank=2), None,
        device="cpu", dtype=torch.float32, gradient_checkpointing=False,
    )  # fmt: skip
    assert set(student.factors()) == set(names)
    # No linear layer of the blocks was missed: what has no adapter is no matrix of a block, or
    # controls a recurrence, or is read by a kernel that knows no adapters.
    left = CONTROLS | set(arch.table.unadapted)
    bare = {tensor.name for tensor in arch.tensors if tensor.role in left}
    plain = AutoModelForCausalLM.from_pretrained(source.path)
    matrices = {
        name
        for name, parameter in plain.named_parameters()
        if parameter.dim() == 2 and name.startswith(arch.table.blocks)
    }
    assert matrices - bare == set(names)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(PlanError, match=r"prune-export\[heal\]"):
        Qlora().check(arch_of("llama"), MACHINE)
    Lora().check(arch_of("llama"), MACHINE)
