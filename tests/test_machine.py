"""A machine's memory is what is free of it: other processes may be on its GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prune_export.execution import Options, plan
from prune_export.machine import Machine
from prune_export.planning.limits import what_does_not_fit
from prune_export.recipe import Recipe


def gpu(patch: pytest.MonkeyPatch, *, free: int, reserved: int = 0, allocated: int = 0) -> None:
    """A GPU of 80 GiB, as torch tells of one."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    patch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    patch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_gpus_memory_is_what_is_free_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, free=30 << 30)
    found = Machine.detect()
    assert (found.device, found.gpu_bytes, found.capability) == ("cuda", 30 << 30, 90)
    gpu(monkeypatch, free=30 << 30, reserved=8 << 30, allocated=3 << 30)
    assert Machine.detect().gpu_bytes == 35 << 30


def test_a_gpu_that_is_full_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan says what is lacking; nothing goes on on the CPU unasked."""
    gpu(monkeypatch, free=0)
    assert Machine.detect().device == "cuda"
    on_cpu = Machine.detect(device="cpu")
    assert (on_cpu.device, on_cpu.gpu_bytes, on_cpu.capability) == ("cpu", 0, 0)


def test_a_plan_is_held_against_what_is_free(
    tiny_llama: Path, corpus: Path, tmp_path: Path
) -> None:
    text = """\
recipe: 1
data: {healing: {files: [healing.jsonl], samples: 4, length: 32}}
stages: [{heal: {method: lora, rank: 2, steps: 1, batch: 1}}]
"""
    on_cpu = Machine("cpu", 8 << 30, 0, 1)
    options = Options(tmp_path / "out", tmp_path / "store", on_cpu)
    planned = plan(Recipe.parse(text, root=corpus), str(tiny_llama), options)
    heal = next(stage for stage in planned.stages if stage.kind == "heal")
    full = replace(on_cpu, device="cuda", gpu_bytes=1 << 20)
    taken = replace(heal, cost=replace(heal.cost, gpu_bytes=5 << 20))
    lacking = what_does_not_fit(
        replace(planned, stages=(taken,), machine=full), 8 << 30, options.store, options.out, {}
    )
    assert str(next(lacking)) == (
        "GPU\n  needs about 5.00 MiB, and 1.00 MiB of its memory are free\n"
        "  end what else is on it, or pass `--device cpu`"
    )
