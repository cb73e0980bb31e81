from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from prune_export.contracts import Cost
from prune_export.heal.full import Full
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.machine import Machine
from prune_export.planning.devices import Devices
from prune_export.planning.planned import Rates, together
from prune_export.training.memory import fit
from prune_export.units import GIB
from tests.arch.tiny_models import arch_of

CPU = Machine("cpu", 64 * GIB, 0, 2)


LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 8192,
}  # fmt: skip
SMOLLM2_24 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "tie_word_embeddings": True, "dtype": "float32", "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("healer", "measured_gib"),
    [
        # Peaks of the resident set of whole runs with windows of 512 (benchmarks/heal.py).
        (Qlora(rank=16, targets="all", batch=2, micro_batch=2, compute_dtype="bfloat16"), 2.98),
        (Qlora(rank=16, batch=2, micro_batch=1, compute_dtype="float32"), 2.65),
        (Lora(rank=64, batch=4, micro_batch=4, compute_dtype="float32"), 5.24),
    ],
)
def test_predicted_memory_is_near_what_was_measured(
    healer: Lora | Qlora, measured_gib: float
) -> None:
    cost = healer.cost(arch_of("llama", **SMOLLM2_24), 0, 512, CPU)
    assert 1 / 1.3 < cost.ram_bytes / GIB / measured_gib < 1.3


def test_four_bit_weights_take_a_quarter_of_sixteen() -> None:
    gpu = Machine("cuda", 64 * GIB, 80 * GIB, 8)
    arch = arch_of("llama", **LLAMA_8B)
    settings: dict[str, Any] = {
        "rank": 8, "batch": 16, "micro_batch": 1, "gradient_checkpointing": True,
        "compute_dtype": "bfloat16",
    }  # fmt: skip
    full = Lora(**settings).cost(arch, 0, 2048, gpu)
    four = Qlora(**settings).cost(arch, 0, 2048, gpu)
    # 6.98 G linear parameters go from 2 bytes to 0.53.
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert full.flops == four.flops
    assert four.ram_bytes <= 3 * GIB + 12 * 128256 * 4096
    settings["gradient_checkpointing"] = False
    saved = Lora(**settings).cost(arch, 0, 2048, gpu).gpu_bytes - full.gpu_bytes
    assert saved > 10 * GIB
    assert linear * 2 < full.gpu_bytes < linear * 2 + 8 * GIB


def test_cost_without_a_machine_names_both_memories() -> None:
    cost = Lora(batch=2).cost(arch_of("llama", **SMOLLM2_24), 10**6, 512)
    assert cost.gpu_bytes > 0
    assert cost.ram_bytes > 0
    on_cpu = Lora(batch=2).cost(arch_of("llama", **SMOLLM2_24), 10**6, 512, CPU)
    assert on_cpu.gpu_bytes == 0


def test_flops_by_hand() -> None:
    arch = arch_of("llama", **SMOLLM2_24)
    block = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    frozen = 24 * block + 49152 * 576
    adapters = 24 * 3 * 4 * (576 + 1536)
    attention = 24 * 512 * 576
    forward_and_back = 4 * frozen + 6 * adapters + 2 * 3.5 * attention
    healer = Lora(rank=4, steps=10, batch=2, micro_batch=1, gradient_checkpointing=False)
    cost = healer.cost(arch, 0, 512, CPU)
    assert cost.flops == pytest.approx(10 * 2 * 512 * forward_and_back)


def test_what_fits_is_chosen() -> None:
    arch = arch_of("llama", **SMOLLM2_24)
    healer = Qlora(rank=8, batch=12)

    def chosen(gib: float, length: int = 512, **changes: Any) -> tuple[int, bool]:
        machine = replace(CPU, ram_bytes=int(gib * GIB))
        found = fit(arch, replace(healer, **changes), None, machine, length=length, item=4)
        return found.micro_batch, found.gradient_checkpointing

    assert chosen(64) == (2, False)  # a CPU gets no faster beyond 1024 tokens
    assert chosen(64, length=128) == (6, False)  # 8 does not divide 12
    assert chosen(64, length=2048) == (1, False)
    assert chosen(1.8) == (2, True)
    assert chosen(64, micro_batch=12) == (12, False)
    assert chosen(4, micro_batch=12) == (12, True)
    assert chosen(64, gradient_checkpointing=True) == (2, True)


@pytest.mark.parametrize("objective", ["next_token", "distill"])
@pytest.mark.parametrize("kind", [Lora, Full])
def test_flops_are_counted_in_the_dtype_that_is_trained_in(kind: Any, objective: Any) -> None:
    arch = arch_of("llama", **SMOLLM2_24)

    def cost(dtype: Any) -> Cost:
        made = {"steps": 10, "batch": 2, "compute_dtype": dtype, "objective": objective}
        healer = TypeAdapter(kind).validate_python(made)
        if objective == "distill":
            return healer.taught_cost(arch, arch, 100, 512, CPU)[0]
        return healer.cost(arch, 0, 512, CPU)

    half, whole = cost("bfloat16"), cost("float32")
    assert half.flops == whole.flops == half.bfloat16_flops
    assert whole.bfloat16_flops == 0


def test_seconds_follow_the_rate_of_the_dtype() -> None:
    rates = Rates(flops=1e9, disk_bytes=1e9, bfloat16_flops=4e9)
    work = Cost(flops=6e9, bfloat16_flops=4e9)
    assert rates.seconds(work) == pytest.approx(2 + 1)
    assert rates.seconds(together(work, work)) == pytest.approx(6)
    assert rates.seconds(Devices(count=2).shared(work, 8)) == pytest.approx(1.5)
