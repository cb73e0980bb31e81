"""Parts of blocks: what they add to, and the losses without them, against written-out blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.table import tables
from prune_export.calibrate import (
    OUTPUTS,
    BlockInfluence,
    CalibrationContext,
    ModelView,
    NormEnergy,
    SkipLoss,
    TokenSet,
    Unit,
    gather,
    pass_cost,
)
from prune_export.calibrate.streaming import driver
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.machine import Machine
from prune_export.surgery import Overwrite, rewrite
from tests.arch.kinds import HALF_BLOCKS
from tests.calibrate.passes.test_ablation import by_hand

VARIANTS = [
    pytest.param(model_type, changes, id=f"{model_type}-{name}")
    for model_type, table in sorted(tables().items())
    if model_type not in HALF_BLOCKS
    for name, changes in {"plain": {}, **table.tiny.variants}.items()
]
PARTS: Any = ("attention", "mlp")


pytestmark = pytest.mark.usefixtures("small_sweeps")


Steps = dict[str, tuple[torch.Tensor, torch.Tensor]]


def serial(attention: Any, norm: Any, mlp_norm: Any, mlp: Any, x: Any, call: Any) -> Steps:
    """Pre-norm: x + attention(norm(x)), and that plus the MLP of its norm."""
    middle = x + attention(norm(x), **call)[0]
    return {"attention": (x, middle), "mlp": (middle, middle + mlp(mlp_norm(middle)))}


def llama(b: Any, x: Any, call: Any) -> Steps:
    return serial(b.self_attn, b.input_layernorm, b.post_attention_layernorm, b.mlp, x, call)


def gpt2(b: Any, x: Any, call: Any) -> Steps:
    return serial(b.attn, b.ln_1, b.ln_2, b.mlp, x, call)


def gpt_neox(b: Any, x: Any, call: Any) -> Steps:
    """Both parts read what enters the block, each through a norm of its own."""
    attention = b.attention(b.input_layernorm(x), **call)[0]
    return {
        "attention": (x, x + attention),
        "mlp": (x, x + b.mlp(b.post_attention_layernorm(x))),
    }


def phi(b: Any, x: Any, call: Any) -> Steps:
    """Both parts read one norm of what enters the block."""
    normed = b.input_layernorm(x)
    attention = b.self_attn(normed, **call)[0]
    return {"attention": (x, x + attention), "mlp": (x, x + b.mlp(normed))}


def gemma2(b: Any, x: Any, call: Any) -> Steps:
    """Outputs are normed before they are added."""
    attention = b.self_attn(b.input_layernorm(x), **call)[0]
    middle = x + b.post_attention_layernorm(attention)
    added = b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(middle)))
    return {"attention": (x, middle), "mlp": (middle, middle + added)}


def granite(b: Any, x: Any, call: Any) -> Steps:
    """Outputs are scaled before they are added."""
    scale = b.residual_multiplier
    middle = x + scale * b.self_attn(b.input_layernorm(x), **call)[0]
    added = b.mlp(b.post_attention_layernorm(middle))
    return {"attention": (x, middle), "mlp": (middle, middle + scale * added)}


def opt(b: Any, x: Any, call: Any) -> Steps:
    """The MLP has no module of its own; norms come before, or after the sums (OPT-350m)."""
    first, last = b.self_attn_layer_norm, b.final_layer_norm

    def mlp(states: Any) -> Any:
        return b.fc2(b.activation_fn(b.fc1(states)))

    if b.do_layer_norm_before:
        return serial(b.self_attn, first, last, mlp, x, call)
    middle = first(x + b.self_attn(x, **call)[0])
    return {
        "attention": (last(first(x)), last(middle)),
        "mlp": (last(middle), last(middle + mlp(middle))),
    }


BY_HAND: list[Any] = [
    pytest.param(model_type, changes, steps, id=f"{model_type} {' '.join(changes)}".strip())
    for model_type, changes, steps in (
        ("llama", {}, llama),
        ("mixtral", {}, llama),
        ("gpt2", {}, gpt2),
        ("gpt_neox", {}, gpt_neox),
        (
            "gpt_neox",
            {"use_parallel_residual": False},
            lambda b, x, call: serial(
                b.attention, b.input_layernorm, b.post_attention_layernorm, b.mlp, x, call
            ),
        ),
        ("phi", {}, phi),
        ("gemma2", {}, gemma2),
        ("granite", {"residual_multiplier": 0.5}, granite),
        ("opt", {}, opt),
        ("opt", {"do_layer_norm_before": False}, opt),
    )
]


def steps_of(made: Any, ids: torch.Tensor, written: Callable[..., Steps]) -> list[Steps]:
    """The steps of every block, from what transformers calls it with."""
    blocks, found = made.model.get_submodule(made.arch.table.blocks), []

    def watch(block: Any, args: Any, named: Any) -> None:
        named = dict(named)
        x = args[0] if args else named.pop("hidden_states")
        # Called again inside, modules must not be watched.
        found.append(written(block, x, named))

    hooks = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        made.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("model_type", "changes", "written"), BY_HAND)
def test_the_influence_of_a_part_is_that_of_its_residual_step(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    changes: Mapping[str, Any],
    written: Callable[..., Steps],
) -> None:
    made = twin(model_type, **changes)
    asked = {part: BlockInfluence(part=part) for part in PARTS}
    found = gather(
        made.checkpoint, [*asked.values(), BlockInfluence()], CalibrationContext(tokens, machine)
    )
    steps = steps_of(made, tokens.ids, written)
    assert len(steps) == made.arch.layers
    for part, statistic in asked.items():
        pairs = [(own[part][0].double(), own[part][1].double()) for own in steps]
        expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]
        assert min(expected) > 1e-3
        torch.testing.assert_close(found[statistic], torch.stack(expected), atol=1e-6, rtol=1e-4)
    alone = gather(made.checkpoint, [BlockInfluence()], CalibrationContext(tokens, machine))
    assert torch.equal(found[BlockInfluence()], alone[BlockInfluence()])


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_a_table_says_whether_the_parts_are_parallel(
    twin: Callable[..., Any], tokens: TokenSet, model_type: str, changes: Mapping[str, Any]
) -> None:
    """They are where what the MLP reads does not depend on what the attention writes."""
    made = twin(model_type, **changes)
    block = made.model.get_submodule(made.arch.table.blocks)[0]
    parameters = dict(made.model.named_parameters())
    names = ("mlp", "fc1", "shared_mlp", "block_sparse_moe", "feed_forward")
    reads = next(name for name in names if name in dict(block.named_children()))
    seen: list[torch.Tensor] = []
    hook = block.get_submodule(reads).register_forward_pre_hook(
        lambda _m, args, named: seen.append(args[0] if args else named["hidden_states"]),
        with_kwargs=True,
    )
    for scale in (1, 0):
        for tensor in made.arch.block(0):
            if tensor.role in OUTPUTS["attention"]:
                parameters[tensor.name].data *= scale
        with torch.no_grad():
            made.model(tokens.ids, use_cache=False)
    hook.remove()
    assert made.arch.parallel is torch.equal(*seen)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "phi", "gpt2", "opt", "mixtral"])
def test_losses_without_parts_equal_those_of_silenced_models(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, model_type: str, part: Any
) -> None:
    """In one pass with blocks bypassed, and on other windows."""
    made = twin(model_type)
    asked = [SkipLoss((0, 2, 5), part=part), SkipLoss((2,)), SkipLoss((3,), 3, 7, part)]
    found = gather(made.checkpoint, asked, CalibrationContext(tokens, machine))
    silent = partial(by_hand, made)
    expected = {layer: silent(tokens.ids, [Unit(layer, part)]) for layer in (0, 2, 5)}
    assert found[asked[0]].skipped == pytest.approx(expected, rel=2e-5)
    assert max(expected.values()) - min(expected.values()) > 1e-3
    assert found[asked[1]].skipped == pytest.approx({2: silent(tokens.ids, [Unit(2)])}, rel=2e-5)
    fewer = silent(tokens.ids[:3, :7], [Unit(3, part)])
    assert found[asked[2]].skipped == pytest.approx({3: fewer}, rel=2e-5)


def test_who_listens_inside_of_blocks_hears_them_once(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("gpt2")
    alone = gather(made.checkpoint, [NormEnergy()], CalibrationContext(tokens, machine))[
        NormEnergy()
    ]
    both = [BlockInfluence(part="attention"), NormEnergy(), SkipLoss((1, 4), part="attention")]
    found = gather(made.checkpoint, both, CalibrationContext(tokens, machine))[NormEnergy()]
    assert alone.keys() == found.keys()
    assert len(alone) == 2 * made.arch.layers + 1
    assert all(torch.equal(alone[key], found[key]) for key in alone)


UNITS = (Unit(1, "attention"), Unit(4, "mlp"))


@pytest.mark.families("roles")
@pytest.mark.parametrize("model_type", sorted(tables().keys() - HALF_BLOCKS))
def test_a_silenced_view_is_the_written_model(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, model_type: str, tmp_path: Path
) -> None:
    made = twin(model_type)
    edits = [
        Overwrite(t.name, partial(torch.zeros, made.arch.shape(t), dtype=torch.float32))
        for unit in UNITS
        for t in made.arch.block(unit.layer)
        if t.role in OUTPUTS[unit.part]
    ]
    written = rewrite(made.checkpoint, made.arch, edits, tmp_path / "out", ram_bytes=1 << 30)
    asked = [BlockInfluence(), BlockInfluence(part="attention"), SkipLoss((2,), part="mlp")]
    expected = gather(written, asked, CalibrationContext(tokens, machine))
    for scratch in (tmp_path / "scratch", None):
        view = ModelView(
            made.arch, made.checkpoint, {}, CalibrationContext(tokens, machine, scratch)
        )
        found = view.ablated(UNITS).gather(asked)
        for statistic in asked[:2]:
            assert torch.equal(found[statistic], expected[statistic])
        assert found[asked[2]] == expected[asked[2]]
        assert found[asked[1]][1] == 0
    again = view.gather(asked)
    assert again[asked[1]][1] > 0, "the view itself is as it was"


def test_a_pass_runs_what_its_progress_and_the_plan_say(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its attention a block still runs: one block more than without the block."""
    made = twin("llama")
    real, ran = LayerwiseModel.run, []

    def counted(self: LayerwiseModel, layer: int, *args: Any) -> torch.Tensor:
        ran.append(layer)
        return real(self, layer, *args)

    monkeypatch.setattr(LayerwiseModel, "run", counted)
    monkeypatch.setattr(driver, "BATCH_TOKENS", {"cpu": 2048})
    flops = {}
    for part, expected in (("block", 6 + 3 + 1), ("mlp", 6 + 4 + 2)):
        ran.clear()
        asked = SkipLoss((2, 4), part=part)  # type: ignore[arg-type]
        gather(made.checkpoint, [asked], CalibrationContext(tokens, machine))
        assert len(ran) == expected
        flops[part] = pass_cost(made.arch, [asked], 5, 12, machine).flops
    plain = pass_cost(made.arch, [BlockInfluence()], 5, 12, machine).flops
    assert flops["mlp"] - flops["block"] == pytest.approx(plain * 2 / 6)
