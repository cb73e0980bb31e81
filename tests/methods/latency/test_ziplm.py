"""ZipLM: compensated cuts, targets that are met, and speeds measured on real engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch import Arch
from prune_export.calibrate import CalibrationContext, TokenSet, run_sequential
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError, StageError
from prune_export.machine import Machine
from prune_export.methods.latency.ziplm import ZipLM
from prune_export.pruning.latency import narrowing, width_costs
from prune_export.recipe.search import Target
from prune_export.surgery import Edits, Keep, Overwrite, rewrite
from tests.arch.tiny_models import Tiny, random_model
from tests.views import random_ids, view_of

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = random_ids(8, 16, 3)


@dataclasses.dataclass
class Counting:
    """Engines whose time is a known function of their widths; what was asked is kept.

    `surprise` is how much slower than the sum of its parts an engine is in which two axes are cut.
    """

    arch: Arch
    surprise: float = 0.0
    asked: list[Mapping[str, int]] = dataclasses.field(default_factory=list)

    def speedup(
        self, sizes: Mapping[str, int], engine: str, request: tuple[int, int, int]
    ) -> float:
        assert (engine, request) == ("onnx", (1, 128, 32))
        self.asked.append(dict(sizes))
        left = {
            name: sum(sizes.get(f"{name}.{i}", self.arch.sizes[f"{name}.{i}"]) for i in range(6))
            / sum(self.arch.sizes[f"{name}.{i}"] for i in range(6))
            for name in ("mlp", "kv")
        }
        both = self.surprise if max(left.values()) < 1 else 0.0
        return 1 / (0.2 + 0.5 * left["mlp"] + 0.3 * left["kv"] + both)


def loss_of(path: Path) -> float:
    class Nothing:
        key = "nothing"

        def watch(self, site: Any, width: int, device: str) -> None:
            return None

        def edit(self, site: Any, weights: Any, seen: Any) -> Any:
            raise AssertionError

    found = run_sequential(
        Checkpoint.open(path), Nothing(), CalibrationContext(TokenSet.of(IDS), MACHINE), loss=True
    )
    assert found.loss is not None
    return found.loss


@pytest.fixture
def llama(tmp_path: Path) -> Tiny:
    changes = {"num_key_value_heads": 4, "hidden_size": 48, "head_dim": 8}
    return random_model("llama", changes, tmp_path / "model")


def test_a_sweeps_loss_is_the_models(llama: Tiny) -> None:
    with torch.no_grad():
        logits = llama.model(IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    assert loss_of(llama.path) == pytest.approx(float(expected), rel=1e-5)


def test_compensated_cuts_lose_less_than_cuts(llama: Tiny, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(llama.path)
    decision = ZipLM(sparsity=0.25).decide(view_of(llama, IDS))
    rewrite(checkpoint, llama.arch, decision.edits, tmp_path / "out", ram_bytes=1 << 30)
    bare = [edit for edit in decision.edits if isinstance(edit, Keep)]
    rewrite(checkpoint, llama.arch, bare, tmp_path / "bare", ram_bytes=1 << 30)
    dense = loss_of(llama.path)
    assert loss_of(tmp_path / "out") < loss_of(tmp_path / "bare")
    assert loss_of(tmp_path / "out") != dense
    sizes = Checkpoint.open(tmp_path / "out").arch().sizes
    assert (sizes["mlp.3"], sizes["kv.3"]) == (36, 3)
    errors = decision.log["errors"]
    assert len(errors) == 12
    assert all(0 < error < 1 for error in errors.values())


def test_channels_without_effect_go_first_and_change_nothing(tmp_path: Path) -> None:
    tiny = random_model("llama", {}, tmp_path / "model")
    idle = [3, 8, 9, 20, 31, 32, 33, 40, 44, 45, 46, 47]
    for block in tiny.model.model.layers:
        block.mlp.up_proj.weight.data[idle] = 0
    tiny.model.save_pretrained(tiny.path)
    swept = view_of(tiny, IDS).sequential(
        narrowing.Narrower(tiny.arch, {f"mlp.{i}": 36 for i in range(6)})
    )
    kept = [position for position in range(48) if position not in idle]
    assert all(logs["mlp.out"]["kept"] == kept for logs in swept.logs)
    for name, value in swept.values():
        was = tiny.model.state_dict()[name][:, kept]
        torch.testing.assert_close(value()[:, kept], was, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("surprise", [0.0, 0.08])
def test_a_speed_is_met_as_measured(llama: Tiny, surprise: float) -> None:
    engines = Counting(llama.arch, surprise)
    target = Target(speedup=1.5, tolerance=0.1)
    decision = ZipLM(target=target, multiple_of=1).decide(view_of(llama, IDS, engines=engines))
    after = Edits.of(decision.edits, llama.arch).after(llama.arch)
    sizes = {axis: after.sizes[axis] for axis in decision.log["sizes"]}
    assert sizes == engines.asked[-1], "what was timed last is what is made"
    assert engines.speedup(sizes, "onnx", (1, 128, 32)) == pytest.approx(1.5, rel=0.1)
    assert len({after.sizes[f"mlp.{i}"] for i in range(6)}) == 1
    losses = [loss for _, loss in decision.log["tried"]]
    assert len(losses) > 1
    chosen = decision.log["tried"][losses.index(min(losses))][0]["kv"]
    assert after.sizes["kv.0"] == chosen


def test_costs_are_what_was_timed(llama: Tiny) -> None:
    kinds = narrowing.limits(llama.arch, 1)
    target = Target(speedup=1.5)
    costs = width_costs.timed(llama.arch, kinds, target, Counting(llama.arch))
    assert costs.base == pytest.approx(0.2)
    assert costs.of("mlp", 12) == pytest.approx(0.5 * 12 / 48)
    assert costs.whole({"mlp": 24, "kv": 2}) == pytest.approx(0.2 + 0.25 + 0.15)


def test_what_is_not_reached_is_said(llama: Tiny) -> None:
    with pytest.raises(StageError) as caught:
        target = Target(speedup=2.5, tolerance=0.02)
        ZipLM(target=target).decide(view_of(llama, IDS, engines=Counting(llama.arch, 0.6)))
    assert "of the target" in str(caught.value)
    with pytest.raises(PlanError) as refused:
        ZipLM(target=Target(speedup=6.0)).decide(view_of(llama, IDS, engines=Counting(llama.arch)))
    assert "asks for 17% of the dense cost" in str(refused.value)


def test_blocks_may_differ_and_lose_whole_parts(llama: Tiny, tmp_path: Path) -> None:
    """Stored with zeros: the same shapes, and the loss that the search was told."""
    engines = Counting(llama.arch)
    target = Target(speedup=1.8, tolerance=0.1)
    method = ZipLM(target=target, uniform=False, tries=6, multiple_of=1)
    decision = method.decide(view_of(llama, IDS, tmp_path / "scratch", engines=engines))
    assert method.predict(llama.arch) == llama.arch
    assert all(isinstance(edit, Overwrite) for edit in decision.edits)
    out = tmp_path / "out"
    rewrite(Checkpoint.open(llama.path), llama.arch, decision.edits, out, ram_bytes=1 << 30)
    assert loss_of(out) == pytest.approx(min(decision.log["tried"]), rel=1e-5)
    sizes = decision.log["sizes"]
    assert engines.speedup(sizes, "onnx", (1, 128, 32)) == pytest.approx(1.8, rel=0.1)
    assert len({sizes.get(f"mlp.{i}", 48) for i in range(6)}) > 1
    for axis, kept in decision.log["kept_positions"].items():
        tensor = narrowing.output(llama.arch, axis)
        groups = narrowing.groups_of(llama.arch, tensor, axis)
        gone = [i for number, group in enumerate(groups) if number not in kept for i in group]
        assert len(kept) == sizes[axis]
        assert not Checkpoint.open(out).read(tensor.name)[:, gone].any()


def test_a_size_is_met_without_engines(llama: Tiny) -> None:
    target = Target(parameters=0.8)
    decision = ZipLM(target=target, multiple_of=1).decide(view_of(llama, IDS))
    after = Edits.of(decision.edits, llama.arch).after(llama.arch)
    assert after.parameters() / llama.arch.parameters() == pytest.approx(0.8, rel=0.05)


@pytest.mark.parametrize(
    ("model_type", "groups"),
    [("llama", (2, 1)), ("gpt2", (4,)), ("olmo2", (2,)), ("gpt_neox", (4,)), ("phi3", (2, 1))],
)
def test_groups_go_only_where_a_model_can_do_without(
    model_type: str, groups: tuple[int, ...], tmp_path: Path
) -> None:
    arch = random_model(model_type, {}, tmp_path / "model").arch
    assert narrowing.limits(arch, 64)[1].sizes == groups


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "neither `sparsity` and `target`"),
        ({"sparsity": 0.5, "target": Target(speedup=2.0)}, "both"),
        ({"sparsity": 0.5, "uniform": False}, "widths that differ"),
        ({"target": Target(speedup=2.0, engine="onxn")}, "not an exporter"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        ZipLM(**settings)
