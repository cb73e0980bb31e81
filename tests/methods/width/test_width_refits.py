"""What width methods refit: least squares towards the dense model, experts, heads that stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.calibrate import CalibrationContext, ModelView, TokenSet, pass_cost
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.methods.width.minitron import Minitron
from prune_export.methods.width.structured_magnitude import StructuredMagnitude
from prune_export.pruning.width.width_passes import Measure, added
from tests.methods.width.conftest import IDS, LLAMA, MACHINE, Cutter, arch_of


@pytest.mark.parametrize("towards", ["dense", "own"])
def test_refits_are_least_squares_on_whole_models(
    towards: Any, cut: Cutter, tmp_path: Path
) -> None:
    """A dense model beside an edited one, site after site, and rows instead of products."""
    method = StructuredMagnitude(ffn=0.5, heads=0.5, per_layer=True, towards=towards)
    tiny, found, log = cut("llama", replace(method, compensate=True))
    arch = tiny.arch
    dense = AutoModelForCausalLM.from_pretrained(tiny.path).eval()
    edited = AutoModelForCausalLM.from_pretrained(tiny.path).eval()
    fitted = IDS.shape[1] - IDS.shape[1] // 8  # of four windows, the ends are held out
    assert len(log["refits"]) == 2 * arch.layers
    for row in log["refits"]:
        assert row["towards"] == towards
        paths = {"attention.out": "self_attn.o_proj", "mlp.out": "mlp.down_proj"}
        path = f"model.layers.{row['layer']}.{paths[row['site']]}"
        (x, y, before), (_, y_dense, before_dense) = (arrived(m, path) for m in (edited, dense))
        weights = torch.ones(x.shape[:2])
        if towards == "dense":
            goal = before_dense + y_dense
            y, weights = (y + goal - before) / 2, 1 / goal.square().mean(-1)
        matrix = found.get_submodule(path).weight.detach()
        stays = matrix.abs().sum(0) > 0
        assert 0 < int(stays.sum()) < len(stays)
        scales = weights[:, :fitted].double().sqrt().flatten()[:, None]
        own = x[:, :fitted].flatten(0, 1)[:, stays].double() * scales
        module = edited.get_submodule(path)
        plain = module.weight.detach()[:, stays].double()
        damping = row["ridge"] * float(own.square().sum(0).mean())
        system = torch.cat([own, damping**0.5 * torch.eye(own.shape[1], dtype=torch.float64)])
        missing = y[:, :fitted].flatten(0, 1).double() * scales - own @ plain.T
        missing = torch.cat([missing, torch.zeros(own.shape[1], len(matrix))])
        change = torch.linalg.lstsq(system, missing).solution.T
        torch.testing.assert_close(matrix[:, stays], (plain + change).float(), atol=2e-3, rtol=2e-3)
        module.weight.data.copy_(matrix)


def test_a_plan_counts_the_dense_states_too() -> None:
    arch, tokens = arch_of("llama", **LLAMA), 8 * 64
    dense, own = (
        pass_cost(arch, Minitron(ffn=0.5, towards=to).statistics(arch), 8, 64, MACHINE)
        for to in ("auto", "own")
    )
    # Four more arrays of 576 floats a token, and the products of 576 outputs with 1536 inputs.
    assert dense.ram_bytes - own.ram_bytes == 4 * (4 * tokens * 576 + 576 * 1536)
    assert dense.flops / own.flops == pytest.approx(3.0 / 1.6)
    little = replace(MACHINE, ram_bytes=8 * tokens * 576)
    assert pass_cost(arch, Minitron(ffn=0.5).statistics(arch), 8, 64, little).disk_bytes > 0


def arrived(model: Any, path: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a projection of a Llama is given, what it gives, and what that is added to."""
    caught: list[torch.Tensor] = []
    block = model.get_submodule(".".join(path.split(".")[:3]))
    norm = block.input_layernorm if "self_attn" in path else block.post_attention_layernorm
    before = norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    own = model.get_submodule(path).register_forward_hook(
        lambda _, args, out: caught.extend((args[0], out))
    )
    with torch.no_grad():
        model(IDS, use_cache=False)
    before.remove()
    own.remove()
    residual, x, y = caught
    return x, y, residual


def test_what_is_normalized_before_it_is_added_is_refitted_to_its_own_output(cut: Cutter) -> None:
    method = StructuredMagnitude(ffn=0.5)
    _, _, log = cut("gemma2", method)
    assert {row["towards"] for row in log["refits"]} == {"own"}
    with pytest.raises(PlanError, match="a gemma2 model normalizes"):
        replace(method, towards="dense").predict(arch_of("gemma2"))
    with pytest.raises(PlanError, match="but none is refitted"):
        replace(method, towards="dense", compensate=False)


def test_experts_are_refitted_to_their_own_outputs(cut: Cutter) -> None:
    _, _, log = cut("mixtral", StructuredMagnitude(ffn=0.5, heads=0.5, compensate=True))
    found = {(row["site"].split(".")[0], row["towards"]) for row in log["refits"]}
    assert found == {("attention", "dense"), ("experts", "own")}


def test_kept_heads_move_away_from_removed_ones(cut: Cutter, tmp_path: Path) -> None:
    """Of 4 heads ranked a, b, c, d, with 3 left: 2 * 3 - 4 + 1 = 3, so c moves away from d."""
    method = Minitron(heads=0.25, head_residual=True, compensate=False)
    tiny, smaller, log = cut("llama", method, num_key_value_heads=4, head_dim=6, hidden_size=24)
    checkpoint = Checkpoint.open(tiny.path)
    context = CalibrationContext(TokenSet.of(IDS), MACHINE, tmp_path / "again")
    view = ModelView(tiny.arch, checkpoint, {}, context)
    measure = Measure(Minitron(heads=0.25).scorer, frozenset({"heads"}), tiny.arch, "")
    scores = added(tiny.arch, {}, view.sequential(measure))
    for layer, block in enumerate(smaller.model.layers):
        a, b, c, d = scores[f"kv.{layer}"].flatten().argsort(descending=True).tolist()
        assert log["removed"][f"kv.{layer}"] == [d]
        prefix = f"model.layers.{layer}.self_attn"
        q = checkpoint.read(f"{prefix}.q_proj.weight").view(4, 6, 24)
        o = checkpoint.read(f"{prefix}.o_proj.weight").view(24, 4, 6)
        at = sorted((a, b, c))
        expected = {a: q[a], b: q[b], c: 2 * q[c] - q[d]}
        found = block.self_attn.q_proj.weight.view(3, 6, 24)
        torch.testing.assert_close(found, torch.stack([expected[head] for head in at]))
        expected = {a: o[:, a], b: o[:, b], c: 2 * o[:, c] - o[:, d]}
        found = block.self_attn.o_proj.weight.view(24, 3, 6)
        torch.testing.assert_close(found, torch.stack([expected[head] for head in at], 1))


@pytest.mark.parametrize(
    ("keys", "groups", "problem"),
    [
        ({"heads": 0.3, "compensate": False}, 3, "of their own, which these share"),
        ({"heads": 0.66, "compensate": False}, 9, "keeps 3 of 9 heads"),
        ({"heads": 0.3}, 9, "which refits what it would change"),
        ({"ffn": 0.3, "compensate": False}, 9, "no heads are cut"),
        ({"heads": 0.3, "compensate": False, "per_layer": True}, 9, "too few heads to move"),
    ],
)
def test_a_head_residual_that_means_nothing_is_refused(
    keys: Any, groups: int, problem: str
) -> None:
    arch = arch_of("llama", **{**LLAMA, "num_key_value_heads": groups})
    with pytest.raises(PlanError, match=problem):
        Minitron(head_residual=True, **keys).predict(arch)
