"""Every way of healing against every objective, on families that differ: what must always hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prune_export.arch.table import tables
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import HealRecord, Taught
from prune_export.errors import PlanError
from prune_export.heal.full import Full
from prune_export.heal.lora import Lora
from prune_export.heal.qlora import Qlora
from prune_export.training.adapters.targets import linear_weights
from prune_export.training.losses.objective import Distill, Distilled
from prune_export.training.settings import Training
from tests.heal.conftest import MACHINE, save_tiny

Heal = Callable[..., tuple[HealRecord, Path]]

BESIDE = Distilled(distill=Distill(cache="live"))
KEPT = Distilled(distill=Distill(cache=16, temperature=1.5))
FAMILIES: dict[str, tuple[str, dict[str, Any], Any, Distilled]] = {
    # name: (type, changes of the config, targets of an adapter, how it distils)
    "llama tied": ("llama", {"tie_word_embeddings": True}, "all", BESIDE),
    "qwen2 with bias": ("qwen2", {"dtype": "bfloat16"}, "all", KEPT),
    "gpt2 transposed": ("gpt2", {}, "all", KEPT),
    "phi3 fused": ("phi3", {}, "all", BESIDE),
    "gemma2 capped": ("gemma2", {}, "all", KEPT),
    "mixtral experts": ("mixtral", {}, ("q", "v"), KEPT),
    "qwen3_moe experts": ("qwen3_moe", {}, ("q", "v"), BESIDE),
    "nemotron_h renamed": ("nemotron_h", {}, "all", BESIDE),
}
METHODS = ("lora", "qlora", "full")
OBJECTIVES = ("next_token", "distill")
SHORT: dict[str, Any] = {"steps": 4, "batch": 4, "compute_dtype": "float32", "warmup": 0}


def healer_of(method: str, family: str, objective: str) -> Training:
    _, _, targets, distilled = FAMILIES[family]
    goal: Any = "next_token" if objective == "next_token" else distilled
    if method == "full":
        return Full(**SHORT, learning_rate=2e-3, objective=goal)
    adapter = {"rank": 4, "targets": targets, "dropout": 0.0, "learning_rate": 1e-2}
    made: type[Lora] | type[Qlora] = Lora if method == "lora" else Qlora
    return made(**SHORT, **adapter, objective=goal)


def pruned(dense: Path, out: Path) -> Path:
    """The same model with half of each linear weight at zero."""
    opened = Checkpoint.open(dense)
    tensors = load_file(dense / "model.safetensors")
    torch.manual_seed(1)
    for tensor in linear_weights(opened.arch()):
        tensors[tensor.name] = tensors[tensor.name] * (torch.rand(tensors[tensor.name].shape) < 0.5)
    out.mkdir()
    for file in dense.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def combinations() -> Iterator[Any]:
    """All of them; quick are so many that any two of family, method and objective meet."""
    for i, family in enumerate(FAMILIES):
        for j, method in enumerate(METHODS):
            for k, objective in enumerate(OBJECTIVES):
                marks = [] if (i + j + k) % 2 == 0 else [pytest.mark.slow]
                yield pytest.param(family, method, objective, marks=marks)


def test_any_two_meet_among_the_quick() -> None:
    quick = [one.values for one in combinations() if not one.marks]
    assert {one[:2] for one in quick} == {(a, b) for a in FAMILIES for b in METHODS}
    assert {one[1:] for one in quick} == {(a, b) for a in METHODS for b in OBJECTIVES}
    assert {one[::2] for one in quick} == {(a, b) for a in FAMILIES for b in OBJECTIVES}


@pytest.mark.parametrize(("family", "method", "objective"), combinations())
def test_what_must_always_hold(
    family: str, method: str, objective: str, tmp_path: Path, heal: Heal
) -> None:
    kind, changes, _, _ = FAMILIES[family]
    dense = save_tiny(tmp_path / "dense", kind, **changes)
    source = pruned(dense, tmp_path / "pruned")
    healer = healer_of(method, family, objective)
    arch = Checkpoint.open(source).arch()
    assert isinstance(healer, Taught)
    assert healer.taught == (objective != "next_token")
    if method == "qlora" and "experts" in family:
        with pytest.raises(PlanError, match="experts"):
            healer.check(arch, MACHINE)  # type: ignore[attr-defined]
        return
    healer.check(arch, MACHINE)  # type: ignore[attr-defined]
    record, out = heal(healer, source, teacher=dense if healer.taught else None)

    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert {name: (t.dtype, t.shape) for name, t in before.items()} == {
        name: (t.dtype, t.shape) for name, t in after.items()
    }
    # What is trained is changed and nothing else; what is in no block is left alone.
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    outside = {t.name for t in arch.stored() if t.layer is None and "norm" not in t.role}
    assert not changed & outside
    linear = {tensor.name for tensor in linear_weights(arch)}
    if method == "full":
        idle = set(before) - outside - changed
        # An expert that no token was sent to has nothing to learn, and k's bias no gradient.
        assert all("expert" in name or name.endswith("k_proj.bias") for name in idle), idle
    else:
        assert changed
        assert changed <= linear

    # Zeros stay, and little else becomes one.
    for name in linear:
        was, now = before[name] == 0, after[name] == 0
        assert bool((was <= now).all())
        assert int(now.sum()) <= 1.01 * int(was.sum()) + 1
    assert record.log["kept_zeros"]["zeros"] > 0

    held_out = record.log["held_out"]["loss"]
    if method != "qlora":
        allowed = 2e-2 if changes.get("dtype") == "bfloat16" else 1e-4
        assert held_out["merged"] == pytest.approx(held_out["trained"], abs=allowed)
    if objective == "next_token":
        assert held_out["trained"] < held_out["before"]
    else:
        losses = [row[1] for row in record.log["loss"]]
        assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("family", ["llama tied", "gpt2 transposed", "mixtral experts"])
def test_embeddings_are_trained_where_asked(family: str, tmp_path: Path, heal: Heal) -> None:
    kind, changes, _, _ = FAMILIES[family]
    source = save_tiny(tmp_path / "model", kind, **changes)
    _, out = heal(Full(**SHORT, learning_rate=2e-3, train_embeddings=True), source)
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert list(before) == list(after)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert all("experts" in name for name in same), same
    # Tied weights stay one tensor.
    assert ("lm_head.weight" in after) == (family == "mixtral experts")


@pytest.mark.parametrize(
    "kind",
    [
        *("gpt2", "phi3", "qwen3_moe"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in sorted(tables())),
    ],
)
def test_an_untouched_model_is_written_as_it_was(kind: str, tmp_path: Path, heal: Heal) -> None:
    """From parameters in memory back to stored weights nothing is mixed up or lost."""
    source = save_tiny(tmp_path / "model", kind)
    healer = Full(**SHORT | {"steps": 1}, learning_rate=1e-30, train_embeddings=True)
    _, out = heal(healer, source)
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert list(before) == list(after)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12)
