"""Every method decides on a CUDA device what it decides on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.calibrate import CalibrationContext, ExtraPass, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.sparsity.nm import Nm
from prune_export.surgery import rewrite
from tests.arch.tiny_models import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEPTH = ("angular_distance", "block_influence", "greedy_loss")
FREE = {"protect_first": 0, "protect_last": 0}
SPARSE = ("magnitude", "wanda", "ria", "sparsegpt", "gblm")
WIDTH = ("minitron", "llm_pruner", "structured_wanda", "structured_magnitude", "structured_gblm")
CASES: list[tuple[str, str, Mapping[str, Any]]] = [
    *((name, "llama", {"remove": 1}) for name in DEPTH),
    *((name, "llama", {"remove": 1, "unit": "mlp"}) for name in ("block_influence", "greedy_loss")),
    *((name, "llama", {"remove": 1, **FREE}) for name in ("perplexity", "taylor")),
    ("laco", "llama", {"remove": 1}),
    *((name, "llama", {"nm": Nm(2, 4)}) for name in SPARSE),
    *((name, "llama", {"sparsity": 0.5}) for name in SPARSE),
    *((name, family, {"nm": Nm(2, 4)}) for name in SPARSE for family in ("gpt2", "opt", "mixtral")),
    *((name, "llama", {"nm": Nm(2, 4), "permute": True}) for name in ("wanda", "sparsegpt")),
    *((name, "llama", {"sparsity": 0.5, "order": "block"}) for name in ("wanda", "sparsegpt")),
    ("wanda", "llama", {"sparsity": 0.4, "allocation": "owl"}),
    ("iterative_magnitude", "llama", {"sparsity": 0.5, "rounds": 2, "steps": 2}),
    *((name, "llama", {"ffn": 0.5}) for name in WIDTH),
    *((name, "llama", {"kv_groups": 0.5}) for name in WIDTH),
    *((name, "mixtral", {"experts": 0.5}) for name in WIDTH[:2]),
    ("minitron", "llama", {"ffn": 0.5, "hidden": 0.25}),
    ("slicegpt", "llama", {"sparsity": 0.25}),
]


def tokens() -> TokenSet:
    ids = torch.randint(3, 60, (8, 48), generator=torch.Generator().manual_seed(0))
    return TokenSet(ids, "gpu-test")


def made(
    method: Any, checkpoint: Checkpoint, device: str, out: Path, gpu_bytes: int | None = None
) -> Checkpoint:
    machine = Machine.detect(device=device, threads=1)
    if gpu_bytes is not None:
        machine = replace(machine, gpu_bytes=gpu_bytes)
    arch = checkpoint.arch()
    (out / "scratch").mkdir(parents=True)
    view = ModelView(arch, checkpoint, {}, CalibrationContext(tokens(), machine, out / "scratch"))
    first = [one for one in method.statistics(arch) if not isinstance(one, ExtraPass)]
    view = ModelView(arch, checkpoint, view.gather(first), view.context)
    edits = method.decide(view).edits
    return rewrite(checkpoint, arch, edits, out / "made", ram_bytes=1 << 30)


@pytest.mark.parametrize(
    ("name", "family", "settings"),
    CASES,
    ids=[f"{name}-{family}-{'-'.join(map(str, settings))}" for name, family, settings in CASES],
)
def test_a_method_decides_as_on_the_cpu(
    name: str, family: str, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(random_model(family, {}, tmp_path / "model").path)
    method = registry.find("methods", name)(**settings)
    on_cpu = made(method, checkpoint, "cpu", tmp_path / "cpu")
    on_gpu = made(method, checkpoint, "cuda", tmp_path / "cuda")
    assert on_gpu.config == on_cpu.config
    assert on_gpu.entries.keys() == on_cpu.entries.keys()
    for tensor in on_cpu.entries:
        wanted, got = on_cpu.read(tensor), on_gpu.read(tensor)
        off = (got - wanted).abs() > 1e-2 * wanted.abs().max()
        assert off.float().mean() < 0.02, tensor


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("angular_distance", {"remove": 1}),
        ("greedy_loss", {"remove": 1}),
        ("laco", {"remove": 1}),
        ("wanda", {"nm": Nm(2, 4)}),
        ("sparsegpt", {"nm": Nm(2, 4)}),
        ("gblm", {"nm": Nm(2, 4)}),
        ("minitron", {"ffn": 0.5}),
        ("slicegpt", {"sparsity": 0.25}),
    ],
)
def test_states_that_the_gpu_has_no_room_for_stay_in_memory(
    name: str, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(random_model("llama", {}, tmp_path / "model").path)
    method = registry.find("methods", name)(**settings)
    roomy = made(method, checkpoint, "cuda", tmp_path / "roomy")
    tight = made(method, checkpoint, "cuda", tmp_path / "tight", gpu_bytes=1 << 16)
    assert tight.entries.keys() == roomy.entries.keys()
    for tensor in roomy.entries:
        wanted, got = roomy.read(tensor), tight.read(tensor)
        assert ((got - wanted).abs() > 1e-2 * wanted.abs().max()).float().mean() < 0.02, tensor


HALF: list[tuple[str, Mapping[str, Any]]] = [
    *((name, {"remove": 1}) for name in (*DEPTH, "laco")),
    *((name, {"nm": Nm(2, 4)}) for name in SPARSE),
    *((name, {"ffn": 0.5}) for name in WIDTH),
    ("slicegpt", {"sparsity": 0.25}),
]


@pytest.mark.parametrize(("name", "settings"), HALF, ids=[name for name, _ in HALF])
def test_a_bfloat16_model_is_pruned_in_its_own_precision(
    name: str, settings: Mapping[str, Any], tmp_path: Path
) -> None:
    """On a GPU it is computed as it is stored, on the CPU in float32: some decisions may differ."""
    path = random_model("llama", {}, tmp_path / "model").path
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    checkpoint = Checkpoint.open(path)
    method = registry.find("methods", name)(**settings)
    on_cpu = made(method, checkpoint, "cpu", tmp_path / "cpu")
    on_gpu = made(method, checkpoint, "cuda", tmp_path / "cuda")
    assert on_gpu.arch() == on_cpu.arch()
    for tensor, entry in on_gpu.entries.items():
        assert entry.dtype == on_cpu.entries[tensor].dtype
        assert bool(on_gpu.read(tensor).isfinite().all())
    if name in SPARSE:
        name = "model.layers.0.mlp.gate_proj.weight"
        same = (on_gpu.read(name) == 0) == (on_cpu.read(name) == 0)
        assert same.float().mean() > 0.9
