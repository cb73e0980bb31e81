"""Zeros stay zeros through healing, and are part of what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord
from prune_export.errors import StageError
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.machine import Machine
from prune_export.training.adapters.masked import Base, _MaskedLinear
from prune_export.training.losses.loss import next_token_loss
from prune_export.training.memory import fit
from prune_export.training.model import Trainee, quiet, trainee
from prune_export.training.settings import Quantization
from prune_export.training.zeros import Packed, kept_zeros, refuse_filled
from tests.arch.tiny_models import arch_of
from tests.heal.conftest import QUICK, save_tiny, windows
from tests.killed import Killed, killed_at
from tests.saved_models import contents
from tests.training.test_memory import SMOLLM2_24

Heal = Callable[..., tuple[HealRecord, Path]]
HEALERS = {
    "lora": Lora(**QUICK, targets="all"),
    "qlora original": Qlora(**QUICK, targets="all"),
    "qlora quantized": Qlora(**QUICK, merge_into="quantized_base"),
    "recomputed": Lora(**QUICK, gradient_checkpointing=True),
    "recomputed qlora": Qlora(**QUICK, gradient_checkpointing=True),
}
LINEAR = (".mlp.", ".self_attn.", ".attn.")


def sparse(path: Path, kind: str = "llama", share: float = 0.5, **changes: Any) -> Path:
    """A tiny model whose linear weights are pruned: 2 of 4, or at random."""
    save_tiny(path, kind, **changes)
    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and any(part in name for part in LINEAR):
            if share == 0.5:
                # Groups run along the input: the last dimension, but the first of Conv1D.
                rows = tensor.T if kind == "gpt2" else tensor
                groups = rows.reshape(-1, 4)
                least = groups.abs().argsort(dim=1)[:, :2]
                pruned = groups.scatter(1, least, 0).view_as(rows)
                tensors[name] = (pruned.T if kind == "gpt2" else pruned).contiguous()
            else:
                tensors[name] = tensor * (torch.rand(tensor.shape) >= share)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def zeros(path: Path) -> dict[str, torch.Tensor]:
    found = load_file(path / "model.safetensors")
    return {name: t == 0 for name, t in found.items() if any(part in name for part in LINEAR)}


@pytest.mark.parametrize("kind", ["llama", "llama bfloat16", "qwen2", "gpt2"])
@pytest.mark.parametrize("name", HEALERS)
def test_zeros_stay_and_the_loss_falls(name: str, kind: str, tmp_path: Path, heal: Heal) -> None:
    family, _, dtype = kind.partition(" ")
    healer = HEALERS[name]
    source = sparse(tmp_path / "model", family, dtype=dtype or "float32")
    record, out = heal(healer, source)
    before, after = zeros(source), zeros(out)
    was, now = (load_file(path / "model.safetensors") for path in (source, out))
    changed = {key for key in was if not torch.equal(was[key], now[key])}
    assert changed
    for key in before:
        if was[key].dim() == 2:
            assert bool(before[key].any())
            # No zero is filled, and little else becomes one.
            assert bool((before[key] <= after[key]).all())
        if name != "qlora quantized":
            assert bool((before[key] == after[key]).all())
    losses = record.log["held_out"]["loss"]
    assert losses["trained"] < losses["before"] - 0.1
    assert losses["merged"] < losses["before"] - 0.1
    if not isinstance(healer, Qlora):
        assert losses["merged"] == pytest.approx(losses["trained"], abs=2e-2 if dtype else 1e-4)
    kept = record.log["kept_zeros"]
    assert kept["weights"] >= len(changed)
    assert kept["zeros"] > 0
    assert kept["patterns"] == {"2 of 4": kept["weights"]}


def test_without_it_an_adapter_fills_the_zeros(tmp_path: Path, heal: Heal) -> None:
    source = sparse(tmp_path / "model")
    record, out = heal(Lora(**QUICK, keep_zeros=False), source)
    assert record.log["kept_zeros"] == {"weights": 0, "zeros": 0, "patterns": {}}
    filled = zeros(out)["model.layers.0.mlp.up_proj.weight"]
    assert not filled.any()


def student_of(
    source: Checkpoint,
    names: list[str],
    settings: Lora,
    quantization: Quantization | None = None,
    recomputed: bool = False,
) -> Trainee:
    with quiet():
        return trainee(
            source, names, settings, quantization,
            device="cpu", dtype=torch.float32, gradient_checkpointing=recomputed,
            keep_zeros=kept_zeros(source, names, "auto"),
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_equal_brute_force(
    kind: str, quantized: bool, recomputed: bool, tmp_path: Path
) -> None:
    source = Checkpoint.open(sparse(tmp_path / "model", kind))
    names = [name for name in zeros(source.path) if name.endswith("weight")]
    names = [name for name in names if len(source.entries[name].shape) == 2]
    settings = Lora(rank=3, alpha=5, dropout=0.0)
    student = student_of(
        source, names, settings, Quantization(True, "original") if quantized else None, recomputed
    )
    torch.manual_seed(3)
    parameters = student.trained()
    for parameter in parameters.values():
        parameter.data.normal_(std=0.1)
    student.model.train()
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = windows(2).ids
    loss = next_token_loss(student.model(input_ids=ids, use_cache=False).logits, ids)
    ours = torch.autograd.grad(loss, list(parameters.values()))

    # The same model as anybody would write it: whole weights, put together by autograd.
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(source.path).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bases = {name: source.read(name) for name in names}
    masks = {name: (base != 0).float() for name, base in bases.items()}
    if quantized:
        bases = {name: value() for name, value in student.dequantized().items()}
    twins = {key: p.detach().clone().requires_grad_() for key, p in parameters.items()}
    weights = {}
    for name in names:
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = (twins[f"{stem}.lora_{part}.default.weight"] for part in "AB")
        delta = 5 / 3 * b @ a
        weights[name] = bases[name] + masks[name] * (delta.T if kind == "gpt2" else delta)
    logits = functional_call(plain, weights, kwargs={"input_ids": ids, "use_cache": False}).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected, list(twins.values()))
    for key, mine, brute in zip(twins, ours, theirs, strict=True):
        torch.testing.assert_close(mine, brute, rtol=1e-4, atol=1e-6, msg=key)


def test_dropout_is_of_the_adapter_only_and_drawn_anew(tmp_path: Path) -> None:
    source = Checkpoint.open(sparse(tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    student = student_of(source, [name], Lora(rank=3, dropout=0.5))
    module = student.adapted[name]
    module.lora_B["default"].weight.data.normal_()
    x = torch.randn(5, module.in_features)
    student.model.eval()
    whole = module(x)
    assert torch.equal(whole, module(x))
    student.model.train()
    assert not torch.allclose(module(x), module(x))
    torch.manual_seed(0)
    mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, whole, rtol=0.1, atol=0.1)
    module.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(module(x), x @ source.read(name).T)


@pytest.mark.parametrize("name", ["lora", "qlora original", "qlora quantized"])
def test_stopped_runs_end_in_the_same_bytes(name: str, tmp_path: Path, heal: Heal) -> None:
    source = sparse(tmp_path / "model")
    healer = replace(HEALERS[name], save_every=3)
    unbroken, expected = heal(healer, source)
    scratch = tmp_path / "scratch"
    for step in (2, 7, 12):
        with pytest.raises(Killed):
            heal(healer, source, scratch=scratch, progress=killed_at(step))
    record, out = heal(healer, source, scratch=scratch)
    assert contents(out) == contents(expected)
    assert record.log == unbroken.log


def test_auto_keeps_what_is_pruned_and_true_keeps_all(tmp_path: Path, heal: Heal) -> None:
    source = Checkpoint.open(sparse(tmp_path / "few", share=0.03))
    names = list(zeros(source.path))
    assert kept_zeros(source, names, "auto") == {}
    all_zeros = kept_zeros(source, names, True)
    assert all_zeros == {name: int(zero.sum()) for name, zero in zeros(source.path).items()}
    some = Checkpoint.open(sparse(tmp_path / "some", share=0.08))
    assert kept_zeros(some, names, "auto") == kept_zeros(some, names, True)
    assert kept_zeros(some, names, False) == {}
    _, out = heal(Lora(**QUICK, keep_zeros=True), source.path)
    after = zeros(out)
    assert all(bool((zero <= after[name]).all()) for name, zero in zeros(source.path).items())


def test_a_dense_model_is_healed_as_before(tmp_path: Path, heal: Heal) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    _, auto = heal(Lora(**QUICK), source)
    _, off = heal(Lora(**QUICK, keep_zeros=False), source)
    assert contents(auto) == contents(off)


def test_a_filled_zero_is_refused(tmp_path: Path) -> None:
    source = Checkpoint.open(sparse(tmp_path / "model"))
    names = [name for name in zeros(source.path) if name.endswith("weight")]
    assert refuse_filled(source, source, source.arch(), names) == {"2 of 4": len(names)}
    tensors = load_file(source.path / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    at = (tensors[name] == 0).nonzero()[-1]
    tensors[name][tuple(at)] = 1e-30
    (tmp_path / "other").mkdir()
    for file in source.path.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        StageError, match=r"(?s)layers\.2\.mlp\.down_proj.*1 weights that were zero"
    ):
        refuse_filled(source, Checkpoint.open(tmp_path / "other"), source.arch(), names)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_is_exact(rows: int, columns: int, seed: int) -> None:
    zero = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = Packed.of(zero, "cpu")
    assert torch.equal(packed.zero(), zero)
    assert packed.bits.numel() == -(-rows * columns // 8)


def test_the_plan_counts_one_layers_sum_and_the_packed_masks() -> None:
    machine = Machine("cpu", 64 << 30, 0, 2)
    arch = arch_of("llama", **SMOLLM2_24)
    costs = {
        (healer.__name__, keep): healer(keep_zeros=keep, compute_dtype="float32").cost(
            arch, 0, 512, machine
        )
        for healer in (Lora, Qlora)
        for keep in (False, True)
    }
    one = 12 * 576 * 1536
    more = costs["Lora", True].ram_bytes - costs["Lora", False].ram_bytes
    assert more == one
    more = costs["Qlora", True].ram_bytes - costs["Qlora", False].ram_bytes
    assert more == one + 24 * 3 * 576 * 1536 // 8
    flops = costs["Lora", True].flops / costs["Lora", False].flops
    assert 1.05 < flops < 1.3
    small = replace(machine, ram_bytes=1 << 30)
    assert fit(arch, Lora(), None, small, length=512, item=4).gradient_checkpointing


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    biased=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_a_masked_layer_is_what_autograd_makes_of_the_formula(
    sizes: tuple[int, int, int, int],
    share: float,
    biased: bool,
    transposed: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    tokens, inputs, outputs, rank = sizes
    torch.manual_seed(seed)
    layer = torch.nn.Linear(inputs, outputs, bias=biased).requires_grad_(False).to(dtype)
    layer.weight.mul_(torch.rand_like(layer.weight) >= share)
    weight = layer.weight.clone()
    if transposed:
        layer.weight = torch.nn.Parameter(weight.T.contiguous(), requires_grad=False)
    x = torch.randn(2, tokens, inputs).to(dtype)
    a, b = torch.randn(rank, inputs) / 4, torch.randn(outputs, rank) / 4
    outer = torch.randn(2, tokens, outputs).to(dtype)
    leaves = [[t.clone().requires_grad_() for t in (x, a, b)] for _ in range(2)]
    ours = _MaskedLinear.apply(*leaves[0], 1.5, Base(layer, transposed))
    (one, two, three) = leaves[1]
    summed = weight.float() + (weight != 0).float() * (1.5 * three @ two)
    theirs = one.float() @ summed.T + (layer.bias.float() if biased else 0)
    limit = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours.float(), theirs, **limit)
    for mine, brute in zip(
        torch.autograd.grad(ours, leaves[0], outer),
        torch.autograd.grad(theirs, leaves[1], outer.float()),
        strict=True,
    ):
        torch.testing.assert_close(mine, brute.to(mine.dtype), **limit)
