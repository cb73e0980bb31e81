"""SliceGPT with one rotation: exact where nothing is cut, and a projection where something is."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prune_export.arch.table import tables
from prune_export.calibrate import CalibrationContext, ModelView, NormInputCovariance, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.methods.rotation.slicegpt import SliceGPT
from prune_export.pruning.rotation import residual_bases
from prune_export.surgery import rewrite
from tests.arch.tiny_models import Tiny, logits, random_model

MACHINE = Machine("cpu", 8 << 30, 0, 1)
ABLE = ("granite", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3")
VARIANTS = [
    pytest.param(model_type, changes, id=f"{model_type}-{name}")
    for model_type in ABLE
    for name, changes in {"plain": {}, **tables()[model_type].tiny.variants}.items()
]


def sliced(tiny: Tiny, method: SliceGPT, out: Path) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(3))
    checkpoint = Checkpoint.open(tiny.path)
    view = ModelView(tiny.arch, checkpoint, {}, CalibrationContext(TokenSet.of(ids), MACHINE))
    view = dataclasses.replace(view, results=view.gather([NormInputCovariance()]))
    decision = method.decide(view)
    rewrite(checkpoint, tiny.arch, decision.edits, out, ram_bytes=1 << 30)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval(), decision.log


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.families("each", "tied")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_rotated_alone_a_model_computes_the_same(
    model_type: str, changes: Mapping[str, Any], tied: bool, tmp_path: Path
) -> None:
    tiny = random_model(model_type, {**changes, "tie_word_embeddings": tied}, tmp_path / "model")
    model, log = sliced(tiny, SliceGPT(sparsity=0), tmp_path / "out")
    assert off(logits(model), tiny.logits()) < 1e-4
    name = f"{tiny.arch.table.blocks}.0.self_attn.o_proj.weight"
    assert off(model.state_dict()[name], tiny.model.state_dict()[name]) > 0.1, "it is rotated"
    assert bool(log["untied"]) is tied


OWN_TYPES = [param for param in VARIANTS if f"sliced_{param.values[0]}" in tables()]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("model_type", "changes"), OWN_TYPES)
def test_rotated_at_each_norm_a_model_computes_the_same(
    model_type: str, changes: Mapping[str, Any], tied: bool, tmp_path: Path
) -> None:
    tiny = random_model(model_type, {**changes, "tie_word_embeddings": tied}, tmp_path / "model")
    method = SliceGPT(sparsity=0, rotation="per_junction")
    model, _ = sliced(tiny, method, tmp_path / "out")
    assert model.config.model_type == f"sliced_{model_type}"
    assert off(logits(model), tiny.logits()) < 1e-4
    turn = model.get_submodule("model.layers.1.mlp_shortcut").weight
    assert off(turn, torch.eye(32)) > 0.1, "the bases differ"


def test_a_basis_for_each_junction_keeps_more_and_counts_its_matrices(tmp_path: Path) -> None:
    tiny = random_model("qwen3", {"tie_word_embeddings": False}, tmp_path / "model")
    own = SliceGPT(sparsity=0.5, rotation="per_junction")
    model, log = sliced(tiny, own, tmp_path / "own")
    _, shared = sliced(tiny, SliceGPT(sparsity=0.5), tmp_path / "shared")
    pairs = zip(log["kept_energy"], shared["kept_energy"], strict=True)
    assert all(one > other for one, other in pairs)
    after = own.predict(tiny.arch)
    extra = after.parameters() - SliceGPT(sparsity=0.5).predict(tiny.arch).parameters()
    assert extra == 2 * tiny.arch.layers * 16**2
    assert after.parameters() == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_its_code_comes_along_for_those_without_prune_export(tmp_path: Path) -> None:
    """A fresh process that knows nothing of us, and allows the checkpoint's code."""
    tiny = random_model("llama", {}, tmp_path / "model")
    model, _ = sliced(tiny, SliceGPT(sparsity=0.5, rotation="per_junction"), tmp_path / "out")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
assert "prune_export" not in sys.modules
ids = torch.tensor([[5, 9, 40, 3]])
found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
slow = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
assert found.tolist() == slow.tolist()
print(found.tolist())
"""
    own = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, env=own, check=False
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([[5, 9, 40, 3]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert done.stdout.strip() == str(expected.tolist())


def test_a_family_without_a_type_of_ours_is_refused(tmp_path: Path) -> None:
    arch = random_model("granite", {}, tmp_path / "model").arch
    with pytest.raises(PlanError, match="there is none for granite") as caught:
        SliceGPT(sparsity=0.5, rotation="per_junction").predict(arch)
    assert "llama, mistral, qwen2, qwen3" in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "phi3"])
def test_what_lies_in_fewer_directions_is_cut_without_loss(model_type: str, tmp_path: Path) -> None:
    """States that use 12 of 32 directions keep everything in 16."""
    tiny = random_model(model_type, {}, tmp_path / "model")
    basis = torch.linalg.qr(torch.randn(32, 12, generator=torch.Generator().manual_seed(1)))[0]
    state = tiny.model.state_dict()
    for name, value in state.items():
        if "embed_tokens" in name:
            value.copy_(value @ basis @ basis.T)
        elif name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            value.copy_(basis @ basis.T @ value)
    tiny.model.save_pretrained(tiny.path)
    model, log = sliced(tiny, SliceGPT(sparsity=0.5), tmp_path / "out")
    assert model.config.hidden_size == 16
    assert min(log["kept_energy"]) == pytest.approx(1, abs=1e-6)
    # The norms' epsilon stays what it was, beside a mean over fewer squares.
    assert off(logits(model), tiny.logits()) < 1e-3


def grams_of(tiny: Tiny) -> Any:
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(3))
    view = ModelView(
        tiny.arch, Checkpoint.open(tiny.path), {}, CalibrationContext(TokenSet.of(ids), MACHINE)
    )
    return view.gather([NormInputCovariance()])[NormInputCovariance()]


def test_a_cut_is_a_projection_of_the_states(tmp_path: Path) -> None:
    """By brute force: the dense model in which all that writes is projected."""
    changes = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
    tiny = random_model("llama", changes, tmp_path / "model")
    model, log = sliced(tiny, SliceGPT(sparsity=0.25, refit=False), tmp_path / "out")
    assert log["hidden"] == [32, 24]
    grams = grams_of(tiny)
    basis = torch.linalg.eigh(sum(grams[i] for i in range(len(grams))))[1][:, -24:].float()
    dense, inner = tiny.logits(), tiny.model.model
    writers = [inner.embed_tokens]
    writers += [module for block in inner.layers for module in (block.self_attn.o_proj, block.mlp)]
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, out: out @ basis @ basis.T)
        for module in writers
    ]
    expected = tiny.logits()
    for hook in hooks:
        hook.remove()
    assert off(dense, expected) > 1e-2
    assert off(logits(model), expected) < 1e-4


def test_grams_equal_brute_force_and_survive_a_spool(tmp_path: Path) -> None:
    tiny = random_model("mistral", {}, tmp_path / "model")
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(3))
    inner, caught = tiny.model.model, []
    norms = [n for b in inner.layers for n in (b.input_layernorm, b.post_attention_layernorm)]
    for norm in (*norms, inner.norm):
        norm.register_forward_pre_hook(lambda _module, args: caught.append(args[0].double()))
    tiny.model(ids, use_cache=False)
    found = grams_of(tiny)
    # So little memory that the pass keeps everything in files.
    poor = CalibrationContext(
        TokenSet.of(ids), dataclasses.replace(MACHINE, ram_bytes=1), tmp_path / "scratch"
    )
    view = ModelView(tiny.arch, Checkpoint.open(tiny.path), {}, poor)
    spooled = view.gather([NormInputCovariance()])[NormInputCovariance()]
    assert list((tmp_path / "scratch").rglob("*grams*"))
    assert len(found) == len(caught) == 13
    for number, states in enumerate(caught):
        unit = torch.nn.functional.normalize(states.detach().flatten(0, -2), dim=-1)
        torch.testing.assert_close(found[number], unit.T @ unit / len(unit), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(spooled[number], found[number])


def test_refitted_matrices_are_the_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(200, 8, generator=random, dtype=torch.float64)
    states = states @ torch.randn(8, 8, generator=random, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 5, generator=random, dtype=torch.float64))[0]
    weight = torch.randn(3, 8, generator=random, dtype=torch.float64)
    found = weight @ residual_bases.fitted(states.T @ states, basis)
    wanted = torch.linalg.lstsq(states @ basis, states @ weight.T).solution.T
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    own = residual_bases.principal([states.T @ states])[:, :5]
    torch.testing.assert_close(residual_bases.fitted(states.T @ states, own), own)


def test_principal_directions_come_in_order_and_with_one_sign() -> None:
    gram = torch.diag(torch.tensor([1.0, 5.0, 3.0], dtype=torch.float64))
    assert residual_bases.principal([gram]).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert residual_bases.principal([-gram, 3 * gram]).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt2", "its norms subtract the mean"),
        ("opt", "its norms subtract the mean"),
        ("gemma2", "`norm.attn.out` scales the states between a matrix and the residual stream"),
        ("olmo2", "it has no norm before attention and MLP"),
    ],
)
def test_what_cannot_be_rotated_is_refused_in_the_plan(
    model_type: str, why: str, tmp_path: Path
) -> None:
    tiny = random_model(model_type, {}, tmp_path / "model")
    with pytest.raises(PlanError) as caught:
        SliceGPT(sparsity=0.25).predict(tiny.arch)
    assert why in str(caught.value)
    listed = str(caught.value).replace(",", " ").split()
    assert set(ABLE) <= set(listed)


def test_the_size_is_one_that_the_config_can_say(tmp_path: Path) -> None:
    """A llama's hidden size must be a multiple of its heads, here of 6."""
    changes = {"hidden_size": 48, "num_attention_heads": 6, "head_dim": 8}
    arch = random_model("llama", changes, tmp_path / "model").arch
    assert SliceGPT(sparsity=0.25).size(arch) == 24
    assert SliceGPT(sparsity=0.25, multiple_of=1).size(arch) == 36
    assert SliceGPT(sparsity=0.01, multiple_of=1).size(arch) == 42, "something is always cut"
    with pytest.raises(PlanError) as caught:
        SliceGPT(sparsity=0.25, multiple_of=32).predict(arch)
    assert "30, 36, 42" in str(caught.value)


def test_the_plan_counts_a_head_of_its_own(tmp_path: Path) -> None:
    arch = random_model("llama", {"tie_word_embeddings": True}, tmp_path / "model").arch
    after = SliceGPT(sparsity=0.5).predict(arch)
    table = arch.sizes["vocab"] * 16
    assert after.parameters() == arch.resized("residual", 16).parameters() + table
