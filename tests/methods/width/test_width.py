"""What width methods leave: sizes, refusals, hidden dimensions, experts and resumed sweeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_export.calibrate import CalibrationContext, ModelView, NormEnergy, TokenSet
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.methods.width.llm_pruner import LlmPruner
from prune_export.methods.width.minitron import Minitron
from prune_export.methods.width.structured_magnitude import StructuredMagnitude
from prune_export.methods.width.structured_wanda import StructuredWanda
from prune_export.pruning.width.unit_choice import chosen, chosen_everywhere
from prune_export.pruning.width.width_sizes import usual_multiple
from prune_export.surgery import Overwrite, rewrite
from tests.arch.tiny_models import logits, random_model
from tests.methods.width.conftest import IDS, LLAMA, MACHINE, Cutter, arch_of


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sparsity": 0.25}, {"mlp": 1152}),
        ({"sparsity": 0.3}, {"mlp": 1088}),
        ({"sparsity": 0.001}, {"mlp": 1472}),
        ({"sparsity": 0.999}, {"mlp": 64}),
        ({"sparsity": 0.3, "multiple_of": 1}, {"mlp": 1075}),
        ({"sparsity": 1 / 3, "axes": ("ffn", "heads")}, {"mlp": 1024, "group": 2}),
        ({"kv_groups": 0.6}, {"kv": 1}),
        ({"hidden": 0.5}, {"residual": 288}),
        ({"hidden": 0.25}, {"residual": 432}),
        ({"hidden": 0.1}, {"residual": 504}),
        ({"hidden": 0.5, "multiple_of": 64}, {"residual": 320}),
        ({"hidden": 0.3, "kv_groups": 0.6}, {"residual": 384, "kv": 1}),
        ({"sparsity": 0.5, "heads": 0.6}, {"mlp": 768, "group": 1}),
    ],
)
def test_sizes_after(keys: Any, expected: dict[str, int]) -> None:
    arch = arch_of("llama", **LLAMA)
    method = Minitron(**keys)
    found = {axis.split(".")[0]: size for axis, size in method.sizes(arch).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("size", "multiple"), [(1536, 64), (576, 64), (768, 64), (320, 32), (48, 4), (16, 2), (7, 1)]
)
def test_the_usual_multiple_leaves_eight_steps(size: int, multiple: int) -> None:
    assert usual_multiple(size) == multiple


def test_query_heads_with_keys_of_their_own_are_cut_with_them() -> None:
    arch = arch_of("llama", **{**LLAMA, "num_key_value_heads": 9})
    assert Minitron(heads=0.66).sizes(arch) == {"kv.0": 3, "kv.1": 3}
    with pytest.raises(PlanError, match="are the same in this model"):
        Minitron(heads=0.5, kv_groups=0.5).predict(arch)


def test_a_head_count_that_transformers_refuses_names_those_it_accepts() -> None:
    arch = arch_of("llama", **{**LLAMA, "num_attention_heads": 24, "num_key_value_heads": 6})
    with pytest.raises(PlanError) as caught:
        Minitron(kv_groups=0.2).predict(arch)
    assert caught.value.where == "config.json  num_attention_heads"
    assert "`kv_groups: 0.333` (4 of 6 left)" in caught.value.fix
    assert Minitron(kv_groups=0.333).predict(arch).sizes["kv.0"] == 4


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox"])
def test_heads_that_no_config_can_say_may_be_zeroed(model_type: str) -> None:
    arch = arch_of(model_type)
    with pytest.raises(PlanError, match="per_layer: true"):
        Minitron(heads=0.5).predict(arch)
    assert Minitron(heads=0.5, per_layer=True).predict(arch).sizes == arch.sizes


def test_heads_normalized_together_are_not_cut() -> None:
    for per_layer in (False, True):
        with pytest.raises(PlanError, match="normalizes all heads together"):
            Minitron(heads=0.5, per_layer=per_layer).predict(arch_of("olmo2"))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "got nothing"),
        ({"sparsity": 0.5, "ffn": 0.5}, "got `sparsity` of `ffn` and `ffn`"),
        ({"hidden": 0.5, "per_layer": True}, "which all blocks share"),
    ],
)
def test_what_cannot_mean_anything_is_refused(keys: Any, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        Minitron(**keys)


def test_parts_that_a_model_lacks_are_refused() -> None:
    with pytest.raises(PlanError, match="is nothing that a llama model has"):
        Minitron(experts=0.5).predict(arch_of("llama", **LLAMA))
    with pytest.raises(PlanError, match="cannot be made smaller in steps of 2048"):
        Minitron(ffn=0.5, multiple_of=2048).predict(arch_of("llama", **LLAMA))
    with pytest.raises(PlanError, match="at least 2"):
        Minitron(experts=0.9).predict(arch_of("mixtral", num_hidden_layers=2))


def test_blocks_left_whole_need_widths_by_block() -> None:
    with pytest.raises(PlanError, match="all blocks are to have one width"):
        LlmPruner(ffn=0.5, protect_first=4)
    method = LlmPruner(ffn=0.5, protect_first=1, protect_last=1, per_layer=True)
    with pytest.raises(PlanError, match="leave none of 2 blocks"):
        method.predict(arch_of("llama", **LLAMA))


def test_blocks_left_whole_are_left_whole(cut: Cutter) -> None:
    method = LlmPruner(ffn=0.25, protect_first=1, protect_last=2, per_layer=True)
    _, _, log = cut("llama", method)
    assert set(log["removed"]) <= {"mlp.1", "mlp.2", "mlp.3"}
    # The others lose what these do not.
    assert sum(len(gone) for gone in log["removed"].values()) == 6 * 12


def test_groups_and_heads_are_chosen_by_score() -> None:
    arch = arch_of("llama", **LLAMA)
    scores = torch.tensor([[9.0, 0, 3], [1, 1, 1], [2, 5, 8]])
    kept = chosen(arch, "kv.0", scores, {"kv.0": 2, "group.0": 2})
    assert kept.tolist() == [[True, False, True], [False] * 3, [False, True, True]]


def test_blocks_ranked_together_lose_where_shares_are_least() -> None:
    arch = arch_of("llama", **{**LLAMA, "intermediate_size": 8})
    scores = {
        "mlp.0": torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1]),
        "mlp.1": torch.tensor([0.1, 90, 0.2, 80, 0.3, 70, 0.4, 60]),
    }
    kept = chosen_everywhere(arch, scores, {"mlp.0": 6, "mlp.1": 6}, (), 2)
    assert kept["mlp.0"].all()
    assert kept["mlp.1"].tolist() == [False, True] * 4


def test_of_heads_ranked_together_every_group_of_a_block_loses_as_many() -> None:
    arch = arch_of("llama", **LLAMA)
    scores = {
        "kv.0": torch.tensor([[9.0, 8, 7], [7, 9, 8], [8, 7, 9]]),
        "kv.1": torch.tensor([[0.1, 9, 8], [9, 8, 0.1], [9, 0.1, 0.2]]),
    }
    kept = chosen_everywhere(arch, scores, {"group.0": 2, "group.1": 2}, (), None)
    assert kept["kv.0"].tolist() == [[True, True, False], [False, True, True], [True, False, True]]
    assert kept["kv.1"].tolist() == [[False, True, True], [True, True, False], [True, False, True]]
    kept = chosen_everywhere(arch, scores, {"kv.0": 2, "kv.1": 3, "group.1": 2}, (), None)
    assert kept["kv.1"].tolist() == [[False, True, True], [True, True, False], [False] * 3]


HIDDEN = ["llama", "gemma2", "gemma3_text", "granite", "phi3", "qwen3", "smollm3", "mixtral"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", HIDDEN)
def test_fewer_hidden_dimensions_are_the_whole_model_with_the_others_at_zero(
    model_type: str, tied: bool, cut: Cutter, tmp_path: Path
) -> None:
    """A root mean square over fewer dimensions is larger, which the twin's gains make up for."""
    method = Minitron(hidden=0.5, rescale_norms=False)
    tiny, smaller, log = cut(model_type, method, tie_word_embeddings=tied)
    size = tiny.arch.sizes["residual"]
    gone = log["removed"]["residual"]
    assert len(gone) == size // 2
    state = load_file(tiny.path / "model.safetensors")
    for tensor in tiny.arch.stored():
        value = state[tensor.name]
        if tensor.role.startswith("norm.") and "residual" in tensor.dims.axes():
            offset = tiny.arch.table.norm_offset
            state[tensor.name] = (value + offset) * 0.5**0.5 - offset
        for number, positions in tensor.dims.kept("residual", gone, tiny.arch.sizes):
            if tensor.role.startswith("norm."):
                continue
            state[tensor.name].index_fill_(number, torch.tensor(positions), 0.0)
    twin = tmp_path / "twin"
    twin.mkdir()
    save_file(state, twin / "model.safetensors", {"format": "pt"})
    (twin / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    expected = logits(AutoModelForCausalLM.from_pretrained(twin).eval())
    assert (expected - tiny.logits()).abs().max() > 1e-2
    torch.testing.assert_close(logits(smaller), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_rescaled_norms_give_what_stays_as_before(model_type: str, tmp_path: Path) -> None:
    """Where a norm is given the same states, and loses channels that are as large as the rest."""
    tiny = random_model(model_type, {}, tmp_path / "model")
    checkpoint = Checkpoint.open(tiny.path)
    context = CalibrationContext(TokenSet.of(IDS), MACHINE, tmp_path / "scratch")
    view = ModelView(tiny.arch, checkpoint, {}, context)
    method = StructuredMagnitude(hidden=0.5)
    asked = method.statistics(tiny.arch)
    assert asked == (NormEnergy(),)
    shares = view.gather(asked)
    view = replace(view, results=shares)
    edits = {e.tensor: e for e in method.decide(view).edits if isinstance(e, Overwrite)}
    caught: list[torch.Tensor] = []
    norm = next(t for t in tiny.arch.block(2) if t.role == "norm.mlp")
    module = tiny.model.get_submodule(norm.name.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        tiny.model(IDS, use_cache=False)
    x = caught[0].flatten(0, 1).double()
    own = x.square() / x.square().sum(-1, keepdim=True)
    share = shares[NormEnergy()][2, "norm.mlp"]
    torch.testing.assert_close(share, own.mean(0), rtol=1e-4, atol=1e-7)
    kept = set(range(32)) - set(method.decide(view).log["removed"]["residual"])
    factor = (float(own.mean(0)[sorted(kept)].sum()) * 2) ** 0.5
    offset = tiny.arch.table.norm_offset
    gain = checkpoint.read(norm.name) + offset
    torch.testing.assert_close(edits[norm.name].value() + offset, gain * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", [Minitron, StructuredMagnitude, StructuredWanda, LlmPruner])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_fewer_experts_are_the_whole_model_that_never_routes_to_the_others(
    model_type: str, method: Any, cut: Cutter
) -> None:
    tiny, smaller, log = cut(model_type, method(experts=0.5))
    assert all(len(gone) == 2 for gone in log["removed"].values())
    hooks = []
    for layer, block in enumerate(tiny.model.get_submodule(tiny.arch.table.blocks)):
        gone = log["removed"].get(f"expert.{layer}")
        if gone:
            gate = next(m for name, m in block.named_modules() if name.endswith("mlp.gate"))
            hooks.append(_never(gate, gone))
    expected = logits(tiny.model)
    for hook in hooks:
        hook()
    assert (expected - tiny.logits()).abs().max() > 1e-2
    torch.testing.assert_close(logits(smaller), expected, atol=1e-3, rtol=1e-3)


def _never(gate: Any, gone: list[int]) -> Callable[[], None]:
    """Makes a router see minus infinity for some experts, inside its own forward."""
    linear = torch.nn.functional.linear

    def forward(*args: Any, **kwargs: Any) -> Any:
        def masked(*own: Any, **more: Any) -> torch.Tensor:
            found = linear(*own, **more)
            found[..., gone] = float("-inf")
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", masked)
            return type(gate).forward(gate, *args, **kwargs)

    gate.forward = forward
    return lambda: delattr(gate, "forward")


def test_everything_at_once(cut: Cutter) -> None:
    method = Minitron(ffn=0.25, heads=0.5, hidden=0.25, compensate=True, rescale_norms=False)
    _, smaller, log = cut("llama", method)
    assert log["width"] == {
        "residual": {"units": 32, "kept": 24},
        "mlp": {"units": 288, "kept": 216},
        "kv": {"units": 24, "kept": 12},
    }
    assert len(log["refits"]) == 12
    assert all(refit["ridge"] for refit in log["refits"])
    assert torch.isfinite(logits(smaller)).all()


def test_a_killed_cut_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prune_export.calibrate.streaming import checkpointing
    from prune_export.pruning.width import width_passes

    monkeypatch.setattr(checkpointing, "INTERVAL_SECONDS", 0.0)
    tiny = random_model("llama", {}, tmp_path / "model")
    checkpoint = Checkpoint.open(tiny.path)
    method = Minitron(ffn=0.5, heads=0.5, per_layer=True)

    def decided(folder: str) -> Any:
        context = CalibrationContext(TokenSet.of(IDS), MACHINE, tmp_path / folder)
        return method.decide(ModelView(tiny.arch, checkpoint, {}, context))

    def bytes_of(decision: Any, name: str) -> bytes:
        rewrite(checkpoint, tiny.arch, decision.edits, tmp_path / name, ram_bytes=1 << 30)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = bytes_of(decided("one"), "whole")
    edit, calls = width_passes.Cut.edit, []

    def counted(self: Any, site: Any, *rest: Any) -> Any:
        calls.append(site.layer)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return edit(self, site, *rest)

    monkeypatch.setattr(width_passes.Cut, "edit", counted)
    with pytest.raises(KeyboardInterrupt):
        decided("two")
    again = bytes_of(decided("two"), "again")
    assert min(calls[7:]) > 0, "it began again"
    assert again == whole
