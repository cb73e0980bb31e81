from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from prune_export import registry
from prune_export.errors import PlanError
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora


def test_the_registry_finds_both() -> None:
    assert registry.find("heal", "lora") is Lora
    assert registry.find("heal", "qlora") is Qlora
    assert {"lora", "qlora"} <= set(registry.names("heal"))


def test_defaults_are_those_of_the_paper() -> None:
    healer = TypeAdapter(Qlora).validate_python({})
    assert (healer.steps, healer.batch, healer.warmup, healer.dropout) == (5000, 16, 100, 0.05)
    assert (healer.learning_rate, healer.schedule, healer.targets) == (3e-4, "cosine", "ffn")
    assert healer.scaling == 1.0
    assert TypeAdapter(Qlora).validate_python({"rank": 8, "alpha": 16}).scaling == 2.0


def test_every_key_is_described() -> None:
    for healer in (Lora, Qlora):
        for name, schema in TypeAdapter(healer).json_schema()["properties"].items():
            assert schema.get("description"), name


@pytest.mark.parametrize(
    "body",
    [
        {"rank": 0}, {"steps": 0}, {"batch": -1}, {"dropout": 1.0}, {"learning_rate": 0},
        {"schedule": "step"}, {"targets": 3}, {"bits": 8}, {"merge_into": "4bit"}, {"seed": -1},
        {"compute_dtype": "float16"}, {"save_every": 0}, {"warmup": -1}, {"max_grad_norm": 0},
    ],
)  # fmt: skip
def test_values_out_of_bounds_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Qlora).validate_python(body)


@pytest.mark.parametrize(
    ("made", "where", "says"),
    [
        (lambda: Lora(batch=6, micro_batch=4), "micro_batch", "1, 2, 3, 6"),
        (lambda: Lora(rank=0), "rank", "more than 0"),
        (lambda: Lora(targets=()), "targets", "empty"),
        (lambda: Lora(dropout=1.5), "dropout", "[0, 1)"),
        (lambda: Qlora(bits=8), "bits", "method: lora"),
    ],
)
def test_contradictions_say_what_to_write(made: Any, where: str, says: str) -> None:
    with pytest.raises(PlanError) as raised:
        made()
    assert raised.value.where == where
    assert says in str(raised.value)


def test_the_learning_rate_rises_then_falls() -> None:
    settings = Lora(steps=40, warmup=3, learning_rate=1.0)
    assert [settings.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    rates = [settings.rate(step) for step in range(3, 40)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01
    linear = Lora(steps=10, warmup=0, learning_rate=1.0, schedule="linear")
    assert [linear.rate(step) for step in (0, 5)] == [1.0, 0.5]
    assert Lora(steps=10, warmup=0, schedule="constant").rate(9) == 3e-4


def test_warmup_takes_at_most_a_tenth() -> None:
    assert Lora(steps=5000).warmup_steps == 100
    assert Lora(steps=120).warmup_steps == 12
    assert Lora(steps=9).warmup_steps == 0


@pytest.mark.slow
def test_advice_to_install_a_kernel_that_is_not_used_is_not_shown() -> None:
    """In a process of its own, whose logging nobody has set up, as a library's user has it."""
    code = (
        "import logging, prune_export.heal.qlora\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward from %s: pip install kernels', 'x')\n"
        "log.warning('other advice')\n"
        "import bitsandbytes\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit" not in told.stderr
    assert "other advice" in told.stderr
