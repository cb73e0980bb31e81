"""Attention or MLP alone, by every method that scores it: what goes, and what is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export import registry
from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.methods.depth.angular_distance import AngularDistanceDrop
from prune_export.methods.depth.block_influence import BlockInfluenceDrop
from prune_export.methods.depth.taylor import Taylor
from prune_export.surgery import Overwrite, rewrite
from tests.arch.tiny_models import Tiny, random_model
from tests.exporters.onnx.graphs import error, expected_logits, exported, padded, stepped
from tests.views import decided

MACHINE = Machine("cpu", 8 << 30, 0, 1)
SCORING = ("block_influence", "perplexity", "taylor")
PARTS = ("attention", "mlp")


def made(tmp_path: Path, model_type: str = "llama", **changes: Any) -> tuple[Tiny, ModelView]:
    tiny = random_model(model_type, changes, tmp_path / "model")
    ids = torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(2))
    context = CalibrationContext(TokenSet.of(ids), MACHINE, tmp_path / "scratch")
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return tiny, ModelView(tiny.arch, Checkpoint.open(tiny.path), {}, context)


def of(name: str, **keys: Any) -> Any:
    """The method as it cuts; what is refitted after is tested in tests/contracts/test_refits.py."""
    protect = {} if name == "block_influence" else {"protect_first": 1, "protect_last": 0}
    return registry.find("methods", name)(refit=False, **protect, **keys)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SCORING)
def test_the_parts_with_the_least_scores_are_zeroed(name: str, part: Any, tmp_path: Path) -> None:
    tiny, model = made(tmp_path)
    method = of(name, remove=2, unit=part)
    assert method.predict(tiny.arch) == tiny.arch
    assert method.note(tiny.arch) == f"2 x {part} stored as zeros, left out of engines"
    found = decided(method, model)
    scores = found.log["block_scores"]
    allowed = [layer for layer in range(6) if name == "block_influence" or layer > 0]
    lowest = sorted(sorted(allowed, key=scores.__getitem__)[:2])
    assert found.log["zeroed"] == [[layer, part] for layer in lowest]
    assert found.log["kept"] == list(range(6))
    assert "dropped" not in found.log
    assert part in found.log["block_score_name"]
    edits = list(found.edits)
    leaf = "self_attn.o_proj" if part == "attention" else "mlp.down_proj"
    assert all(isinstance(edit, Overwrite) for edit in edits)
    assert [edit.tensor for edit in edits] == [
        f"model.layers.{layer}.{leaf}.weight" for layer in lowest
    ]
    blocks = decided(of(name, remove=2), model).log["block_scores"]
    assert blocks[1:] != pytest.approx(scores[1:], rel=1e-2), "a part is not the block"


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("block_influence", {}), ("block_influence", {"select": "iterative"}),
        ("perplexity", {}), ("perplexity", {"select": "greedy"}), ("taylor", {}),
        ("greedy_loss", {"samples": 2, "length": 16}),
    ],
)  # fmt: skip
def test_what_an_earlier_stage_silenced_is_not_removed_again(
    name: str, keys: Any, tmp_path: Path
) -> None:
    tiny, model = made(tmp_path)
    method = of(name, remove=2, unit="attention", **keys)
    first = decided(method, model)
    rewrite(model.checkpoint, tiny.arch, first.edits, tmp_path / "once", ram_bytes=1 << 30)
    once = ModelView(tiny.arch, Checkpoint.open(tmp_path / "once"), {}, model.context)
    second = decided(method, once)
    gone, anew = ({layer for layer, _ in one.log["zeroed"]} for one in (first, second))
    assert len(gone) == len(anew) == 2
    assert not gone & anew
    rewrite(once.checkpoint, tiny.arch, second.edits, tmp_path / "twice", ram_bytes=1 << 30)
    twice = ModelView(tiny.arch, Checkpoint.open(tmp_path / "twice"), {}, model.context)
    with pytest.raises(StageError, match=r"to be removed, and [12] are left to choose from: of 4"):
        decided(replace(method, remove=3), twice)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SCORING)
def test_iterative_is_one_shot_in_the_written_model(name: str, part: Any, tmp_path: Path) -> None:
    """What is left of a model from which a part was removed is scored as if it came so."""
    tiny, model = made(tmp_path)
    found = decided(of(name, remove=2, unit=part, select="iterative"), model)
    first, second = found.log["order"]
    one = decided(of(name, remove=1, unit=part), model)
    assert one.log["zeroed"] == [[first, part]]
    rewrite(model.checkpoint, tiny.arch, one.edits, tmp_path / "one", ram_bytes=1 << 30)
    written = Checkpoint.open(tmp_path / "one")
    after = decided(of(name, remove=2, unit=part), ModelView(tiny.arch, written, {}, model.context))
    # There, what was removed scores least of all: it adds nothing.
    ranked = [layer for layer in after.log["order"] if layer != first]
    assert ranked[0] == second
    scores = after.log["block_scores"]
    step = found.log["steps"][1]
    assert step["removed"] == second
    measured = torch.tensor(scores[second]).log() if name == "perplexity" else scores[second]
    assert step["score"] == pytest.approx(float(measured), rel=1e-6)


@pytest.mark.parametrize("name", SCORING)
def test_guided_by_a_part_s_score_the_loss_decides(name: str, tmp_path: Path) -> None:
    """Six parts are fewer than are tried: what goes is what plain greedy removal takes."""
    _, model = made(tmp_path)
    found = decided(of(name, remove=2, unit="mlp", select="greedy"), model)
    protect = {} if name == "block_influence" else {"protect_first": 1}
    greedy = registry.find("methods", "greedy_loss")
    expected = decided(greedy(remove=2, revise=False, unit="mlp", **protect), model)
    assert found.log["order"] == expected.log["order"]
    assert found.log["zeroed"] == expected.log["zeroed"]


@pytest.mark.parametrize(
    ("model_type", "modules"),
    [
        ("llama", {"attention": ["self_attn"], "mlp": ["mlp"]}),
        ("qwen3", {"attention": ["self_attn"], "mlp": ["mlp"]}),
        ("mixtral", {"attention": ["self_attn"], "mlp": ["mlp"]}),
        ("gpt2", {"attention": ["attn"], "mlp": ["mlp"]}),
        ("gpt_neox", {"attention": ["attention"], "mlp": ["mlp"]}),
        ("phi", {"attention": ["self_attn"], "mlp": ["mlp"]}),
        ("opt", {"attention": ["self_attn"], "mlp": ["fc1", "fc2"]}),
    ],
)
def test_taylor_scores_of_parts_equal_autograd(
    model_type: str, modules: dict[str, list[str]], tmp_path: Path
) -> None:
    """Of a part, all that its modules hold: the norms around them are in neither."""
    changes = {"qk_layernorm": True} if model_type == "phi" else {}
    tiny, view = made(tmp_path, model_type, **changes)
    model = tiny.model.float()
    for window in view.calibration().tokens.ids:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:]).backward()
    blocks = model.get_submodule(tiny.arch.table.blocks)
    for part in PARTS:
        method: Any = Taylor(remove=1, unit=part, protect_first=0, protect_last=0)  # type: ignore[arg-type]
        expected = [
            sum(
                float((p * p.grad).detach().abs().sum())
                for name in modules[part]
                for p in block.get_submodule(name).parameters()
                if p.grad is not None
            )
            for block in blocks
        ]
        assert method.decide(view).log["block_scores"] == pytest.approx(expected, rel=1e-3)


def test_listed_parts_need_no_data_and_bad_ones_are_refused(tmp_path: Path) -> None:
    tiny, model = made(tmp_path)
    for name in SCORING:
        method = of(name, layers=(4, 1), unit="mlp")
        assert method.statistics(tiny.arch) == ()
        assert method.decide(model).log["zeroed"] == [[1, "mlp"], [4, "mlp"]]
        with pytest.raises(PlanError, match="has layers 0 to 5"):
            of(name, layers=(6,), unit="attention").predict(tiny.arch)
        with pytest.raises(PlanError, match="keep at least one"):
            of(name, remove=6, unit="attention").of(tiny.arch)


def test_a_distance_across_blocks_knows_no_parts() -> None:
    """Its score is of runs of whole blocks; nothing goes between the parts of two of them."""
    with pytest.raises(TypeError, match="unit"):
        AngularDistanceDrop(remove=1, unit="attention")  # type: ignore[call-arg]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_engines_leave_out_what_stock_transformers_loads_as_zeros(
    model_type: str, tmp_path: Path
) -> None:
    tiny, model = made(tmp_path, model_type)
    decision = decided(BlockInfluenceDrop(remove=2, unit="attention"), model)
    rewrite(model.checkpoint, tiny.arch, decision.edits, tmp_path / "out", ram_bytes=1 << 30)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    record = exported(Onnx(), tmp_path / "out", tmp_path / "onnx")
    assert record.notes[1].startswith("trimmed: 2 attention")
    ids, mask = padded(tiny.arch.sizes["vocab"])
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got = stepped(runner, ids, mask)
    assert error(got, expected_logits(loaded.eval(), ids, mask), mask) < 1e-5
