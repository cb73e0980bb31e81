"""The sparse methods on tiny models: what they refuse, what becomes zero, what they write down."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.arch import Arch
from prune_export.arch.table import tables
from prune_export.calibrate import (
    LINEAR_GROUPS,
    as_matrix,
    linears,
    pass_cost,
    suspended_bytes,
)
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.methods.sparse.magnitude import Magnitude
from prune_export.methods.sparse.ria import Ria, relative_importance
from prune_export.methods.sparse.sparsegpt import SparseGpt
from prune_export.methods.sparse.wanda import Wanda
from prune_export.pruning.sparse import owl, sparse_method
from prune_export.pruning.sparse.masks import mask_of
from prune_export.sparsity.nm import Nm
from tests.arch.tiny_models import arch_of, random_model
from tests.views import random_ids, view_of

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = random_ids(4, 12, 3)
METHODS: list[Any] = [Magnitude, Wanda, Ria, SparseGpt]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(model_type: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
        path = tmp_path / f"{model_type}-{dtype}"
        random_model(model_type, {}, path)
        if dtype != torch.float32:
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype).save_pretrained(path)
        return Checkpoint.open(path)

    return make


def made(decision: Decision) -> dict[str, torch.Tensor]:
    return {edit.tensor: edit.value() for edit in decision.edits}  # type: ignore[union-attr]


def matrices(arch: Arch, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as `[out, in]`."""
    return {name: as_matrix(arch.by_name[name], value) for name, value in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amount", [{"sparsity": 0.35}, {"nm": Nm(1, 4)}, {"nm": Nm(6, 8)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_matrix_gets_exactly_its_zeros_in_its_own_dtype(
    method: Any, amount: dict[str, Any], dtype: torch.dtype, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny("llama", dtype)
    arch, own = checkpoint.arch(), method(**amount)
    decision = own.decide(view_of(checkpoint, IDS))
    found = made(decision)
    assert found.keys() == {tensor.name for tensor in linears(arch)}
    for name, weight in found.items():
        before = checkpoint.read(name)
        assert weight.dtype == before.dtype
        assert weight.shape == before.shape
        zero = int((weight == 0).sum())
        assert decision.log["tensors"][name]["zeros"] == zero
        if own.nm is not None:
            kept = (weight.view(-1, own.nm.of) != 0).sum(-1)
            assert bool((kept == own.nm.keep).all())
        elif method in (Wanda,):
            assert bool(((weight == 0).sum(-1) == int(0.35 * weight.shape[1])).all())
        else:
            assert abs(zero - 0.35 * weight.numel()) < 1
        if method is not SparseGpt:
            assert torch.equal(weight[weight != 0], before[weight != 0]), "others are untouched"
    total = sum(weight.numel() for weight in found.values())
    assert decision.log["weights"] == total
    assert decision.log["sparsity"] == decision.log["zeros"] / total
    json.dumps(decision.log)


@pytest.mark.families("matrices")
@pytest.mark.parametrize("model_type", sorted(tables()))
@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGpt])
def test_groups_run_along_the_input_in_every_layout(
    method: Any, model_type: str, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny(model_type)
    arch = checkpoint.arch()
    roles = tuple(dict.fromkeys(tensor.role for tensor in linears(arch)))
    found = matrices(
        arch, made(method(nm=Nm(2, 4), include=roles).decide(view_of(checkpoint, IDS)))
    )
    assert {arch.by_name[name].role for name in found} == set(roles)
    for name, weight in found.items():
        kept = (weight.reshape(-1, 4) != 0).sum(-1)
        assert bool((kept <= 2).all()), name
        assert float((kept == 2).float().mean()) > 0.9, "and no more than that"
    if model_type == "gpt2":
        stored = made(Wanda(nm=Nm(2, 4), include=("qkv",)).decide(view_of(checkpoint, IDS)))
        assert stored["transformer.h.0.attn.c_attn.weight"].shape == (32, 96)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_wanda_is_the_weight_times_the_norm_of_its_input(
    model_type: str, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny(model_type)
    arch, view = checkpoint.arch(), view_of(checkpoint, IDS)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    norms: dict[str, torch.Tensor] = {}
    first = [tensor for tensor in linears(arch) if tensor.layer == 0]
    for tensor in first:
        module = model.get_submodule(tensor.name.removesuffix(".weight"))
        module.register_forward_pre_hook(
            lambda _, args, name=tensor.name: norms.update(
                {name: args[0].flatten(0, -2).double().square().sum(0).sqrt()}
            )
        )
    with torch.no_grad():
        model(view.calibration().tokens.ids, use_cache=False)
    found = made(Wanda(sparsity=0.5, order="block").decide(view))
    found_relative = made(Ria(nm=Nm(2, 4), order="block").decide(view))
    for tensor in first:
        weight = as_matrix(tensor, checkpoint.read(tensor.name)).double()
        scores = weight.abs() * norms[tensor.name]
        own = as_matrix(tensor, found[tensor.name])
        assert torch.equal(own != 0, mask_of(scores, 0.5)), tensor.name
        size = weight.abs()
        scores = size / size.sum(0) + size / size.sum(1)[:, None]
        own = as_matrix(tensor, found_relative[tensor.name])
        assert torch.equal(own != 0, mask_of(scores * norms[tensor.name].sqrt(), Nm(2, 4)))


def test_the_true_order_prunes_from_what_pruned_matrices_give(
    tiny: Callable[..., Checkpoint],
) -> None:
    view = view_of(tiny("llama"), IDS)
    one = made(Wanda(sparsity=0.6).decide(view))
    other = made(Wanda(sparsity=0.6, order="block").decide(view))
    same = {name: torch.equal(one[name] == 0, other[name] == 0) for name in one}
    assert all(same[f"model.layers.0.self_attn.{role}_proj.weight"] for role in "qkv")
    assert not same["model.layers.0.mlp.down_proj.weight"]


def test_relative_importance_by_hand() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [3.0, 1.0, 0.0]])
    expected = torch.tensor([[1 / 4 + 1 / 4, 3 / 4 + 3 / 4, 0], [3 / 4 + 3 / 4, 1 / 4 + 1 / 4, 0]])
    torch.testing.assert_close(relative_importance(weight), expected)


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGpt])
def test_only_what_was_asked_for_is_pruned(method: Any, tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny("llama")
    own = method(sparsity=0.5, include=("q", "down"), exclude=("q",), layers=(1, 4))
    assert made(own.decide(view_of(checkpoint, IDS))).keys() == {
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.4.mlp.down_proj.weight",
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_model_is_pruned_further_and_keeps_its_zeros(
    method: Any, tiny: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    from prune_export.surgery import rewrite

    checkpoint = tiny("llama")
    arch = checkpoint.arch()
    first = method(sparsity=0.3, include=("gate", "o")).decide(view_of(checkpoint, IDS))
    once = rewrite(checkpoint, arch, first.edits, tmp_path / "once", ram_bytes=1 << 30)
    twice = made(method(sparsity=0.5).decide(view_of(once, IDS)))
    for name, weight in twice.items():
        assert bool((weight[once.read(name) == 0] == 0).all()), "a zero came back"
        assert abs(int((weight == 0).sum()) / weight.numel() - 0.5) < 0.02


def test_an_expert_that_no_token_reached_goes_by_magnitude(
    tiny: Callable[..., Checkpoint],
) -> None:
    checkpoint = tiny("mixtral")
    view = view_of(checkpoint, random_ids(1, 1, 3))
    for own in (Wanda(sparsity=0.5), SparseGpt(sparsity=0.5)):
        decision = own.decide(view)
        unseen = decision.log["by_magnitude_for_want_of_tokens"]
        assert unseen
        found = made(decision)
        for name in unseen:
            weight = checkpoint.read(name)
            zero = found[name] == 0
            if isinstance(own, Wanda):
                assert torch.equal(~zero, mask_of(weight.abs(), 0.5))
            else:
                assert weight[zero].abs().max() <= weight[~zero].abs().min()
            assert torch.equal(found[name][~zero], weight[~zero])


def test_blocks_with_outliers_are_spared() -> None:
    """Shares 0, 1, 4 %: by 2 x 0.08 x (D - min) / (max - min), less the mean."""
    found = owl.spread_out({0: 0.0, 1: 0.01, 2: 0.04}, {0: 1, 1: 1, 2: 1}, 0.5, 0.08)
    mean = (0 + 0.04 + 0.16) / 3
    assert found == pytest.approx({0: 0.5 + mean, 1: 0.46 + mean, 2: 0.34 + mean})
    unequal = owl.spread_out({0: 0.0, 3: 0.04}, {0: 300, 3: 100}, 0.6, 0.05)
    assert (300 * unequal[0] + 100 * unequal[3]) / 400 == pytest.approx(0.6)
    assert unequal[0] - unequal[3] == pytest.approx(0.1)
    assert owl.spread_out({0: 0.2, 1: 0.2}, {0: 1, 1: 2}, 0.7, 0.08) == {0: 0.7, 1: 0.7}


@pytest.mark.parametrize("method", METHODS)
def test_owl_keeps_the_total_and_counts_outliers_of_the_dense_model(
    method: Any, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny("llama")
    arch, view = checkpoint.arch(), view_of(checkpoint, IDS)
    own = method(sparsity=0.5, allocation="owl", owl_outlier=2.0)
    assert len(own.statistics(arch)) == (1 if method is Magnitude else 2)
    decision = own.decide(view)
    assert 0.5 - 1 / 32 <= decision.log["sparsity"] < 0.5001, "rows of 32, rounded down"
    log = decision.log["owl"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    scores: dict[int, list[torch.Tensor]] = {}
    for tensor in linears(arch):
        module = model.get_submodule(tensor.name.removesuffix(".weight"))
        module.register_forward_pre_hook(
            lambda module, args, layer=tensor.layer: scores.setdefault(layer, []).append(
                (module.weight.abs() * args[0].flatten(0, -2).square().sum(0).sqrt()).flatten()
            )
        )
    with torch.no_grad():
        model(view.calibration().tokens.ids, use_cache=False)
    pooled = [torch.cat(scores[layer]) for layer in range(arch.layers)]
    shares = [float((one > 2.0 * one.mean()).float().mean()) for one in pooled]
    assert log["outlier_shares"] == pytest.approx(shares, abs=1e-4)
    by_block = log["sparsity_by_block"]
    assert by_block.index(min(by_block)) == shares.index(max(shares))
    assert max(by_block) - min(by_block) == pytest.approx(0.16)


def test_the_plan_knows_what_a_sweep_takes() -> None:
    arch = arch_of("llama")
    assert Magnitude(sparsity=0.5).statistics(arch) == ()
    (one,) = Wanda(sparsity=0.5).statistics(arch)
    (both,) = Wanda(sparsity=0.5, order="block").statistics(arch)
    (grams,) = SparseGpt(sparsity=0.5).statistics(arch)
    assert (one.forwards, both.forwards) == (1, 2)
    # Three sites of 32 inputs and one of 48, and the factor of the widest and its workspace.
    assert grams.ram_bytes - one.ram_bytes > 4 * (3 * 32**2 + 48**2) + 8 * 48**2
    cost = pass_cost(arch, [one], 8, 16, MACHINE)
    less = pass_cost(arch, [replace(one, suspends=False)], 8, 16, MACHINE)
    assert cost.ram_bytes - less.ram_bytes == suspended_bytes(arch, 8 * 16, torch.float32)
    poor = pass_cost(arch, [one], 8, 16, replace(MACHINE, ram_bytes=0))
    assert poor.flops > 2 * cost.flops, "what cannot wait is computed again"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "neither `sparsity` nor `nm`"),
    ("llama", {"sparsity": 0.5, "nm": Nm(2, 4)}, "both"),
    ("llama", {"sparsity": 0.5, "include": ("dawn",)}, "dawn[\\s\\S]*down"),
    ("gpt2", {"sparsity": 0.5, "include": ("q",)}, "has none[\\s\\S]*qkv"),
    ("llama", {"sparsity": 0.5, "exclude": tuple(LINEAR_GROUPS)}, "has none|leave nothing"),
    ("llama", {"sparsity": 0.5, "layers": (6,)}, "6 blocks[\\s\\S]*up to 5"),
    ("llama", {"nm": Nm(8, 32)}, r"down_proj[\s\S]*48 inputs[\s\S]*keep: 4, of: 16"),
    ("gpt2", {"nm": Nm(3, 5)}, r"c_attn[\s\S]*32 inputs[\s\S]*exclude"),
    ("llama", {"nm": Nm(2, 4), "allocation": "owl"}, "the same in every block"),
    ("llama", {"sparsity": 0.9, "allocation": "owl"}, r"owl_spread 0.08[\s\S]*owl_spread: 0.04"),
]


@pytest.mark.parametrize(("model_type", "keys", "said"), REFUSED)
def test_what_cannot_be_is_refused_in_the_plan(
    model_type: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(PlanError, match=said):
        Wanda(**keys).predict(arch_of(model_type))


def test_routers_norms_and_embeddings_are_never_pruned() -> None:
    for model_type in ("mixtral", "qwen3_moe", "gemma2"):
        arch = arch_of(model_type)
        roles = {tensor.role for tensor in Wanda(sparsity=0.5).targets(arch)}
        assert roles <= set(LINEAR_GROUPS)
        assert "router" not in roles
    with pytest.raises(PlanError, match="router"):
        Wanda(sparsity=0.5, include=("router",))


def test_zeros_without_a_pattern_come_with_a_warning(tiny: Callable[..., Checkpoint]) -> None:
    view = view_of(tiny("llama"), IDS)
    assert Magnitude(sparsity=0.5).decide(view).log["notes"] == [sparse_method.NO_SPEEDUP]
    assert Magnitude(nm=Nm(2, 4)).decide(view).log["notes"] == []


@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_recipes_can_say_it(name: str) -> None:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(registry.find("methods", name))
    found = adapter.validate_python({"nm": {"keep": 6, "of": 8}, "exclude": ["down"]})
    assert found.nm == Nm(6, 8)
    assert found.exclude == ("down",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitude_over_the_model_has_one_limit(
    dtype: torch.dtype, tiny: Callable[..., Checkpoint]
) -> None:
    checkpoint = tiny("gpt2", dtype)
    arch = checkpoint.arch()
    decision = Magnitude(sparsity=0.6, compare="model").decide(view_of(checkpoint, IDS))
    before = torch.cat([checkpoint.read(t.name).float().abs().flatten() for t in linears(arch)])
    found = made(decision)
    zero = torch.cat([(found[tensor.name] == 0).flatten() for tensor in linears(arch)])
    assert int(zero.sum()) == int(0.6 * len(before)) == decision.log["zeros"]
    assert before[zero].max() == pytest.approx(decision.log["limit"])
    assert before[~zero].min() >= decision.log["limit"]
    shares = {own["sparsity"] for own in decision.log["tensors"].values()}
    assert len(shares) > 3
    for keys in ({"nm": Nm(2, 4)}, {"sparsity": 0.5, "allocation": "owl"}):
        with pytest.raises(PlanError, match="compare: model"):
            Magnitude(**keys, compare="model").predict(arch)  # type: ignore[arg-type]
