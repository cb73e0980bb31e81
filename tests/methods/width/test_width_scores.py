"""Scores of width methods against a whole transformers model, and what they choose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.calibrate import CalibrationContext, ModelView, TokenSet
from prune_export.calibrate.streaming.linear_groups import as_matrix
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine
from prune_export.methods.width.llm_pruner import LlmPruner
from prune_export.methods.width.minitron import Minitron
from prune_export.methods.width.structured_gblm import StructuredGblm
from prune_export.methods.width.structured_magnitude import StructuredMagnitude
from prune_export.methods.width.structured_wanda import StructuredWanda
from prune_export.pruning.width.activation_scores import Activations
from prune_export.pruning.width.unit_scores import UnitReader
from prune_export.pruning.width.width_passes import Measure, added
from tests.arch.tiny_models import Tiny, random_model

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Tiny, ModelView]]:
    def make(model_type: str) -> tuple[Tiny, ModelView]:
        folder = tmp_path_factory.mktemp(model_type)
        tiny = random_model(model_type, {}, folder / "model")
        context = CalibrationContext(TokenSet.of(IDS), MACHINE, folder / "scratch")
        return tiny, ModelView(tiny.arch, Checkpoint.open(tiny.path), {}, context)

    return make


def inputs_of(tiny: Tiny, name: str) -> torch.Tensor:
    """`[windows, length, in]`: what a module of the whole model is given."""
    caught: list[torch.Tensor] = []
    module = tiny.model.get_submodule(name.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        tiny.model(IDS, use_cache=False)
    hook.remove()
    return caught[0].reshape(len(IDS), IDS.shape[1], -1).double()


def measured(method: Any, view: ModelView) -> dict[str, torch.Tensor]:
    measure = Measure(method.scorer, frozenset(method.fractions), view.arch, repr(method))
    return added(view.arch, {}, view.sequential(measure))


def role(tiny: Tiny, layer: int, wanted: str) -> Any:
    return next(tensor for tensor in tiny.arch.block(layer) if tensor.role == wanted)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3", "gemma3_text"])
def test_minitron_scores_by_hand(model_type: str, made: Any) -> None:
    tiny, view = made(model_type)
    found = measured(Minitron(ffn=0.5, heads=0.5, hidden=0.5), view)
    hidden = torch.zeros(tiny.arch.sizes["residual"], dtype=torch.float64)
    for layer in range(tiny.arch.layers):
        x = inputs_of(tiny, role(tiny, layer, "down").name)
        expected = x.abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(found[f"mlp.{layer}"], expected, rtol=1e-3, atol=1e-4)
        x = inputs_of(tiny, role(tiny, layer, "o").name)
        heads = x.view(*x.shape[:2], -1, tiny.arch.sizes["dim"]).norm(dim=-1)
        expected = heads.mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(found[f"kv.{layer}"].flatten(), expected, rtol=1e-3, atol=1e-4)
        for first in ({"q", "qkv"}, {"gate", "up", "gate_up"}):
            tensor = next(t for t in tiny.arch.block(layer) if t.role in first)
            hidden += inputs_of(tiny, tensor.name).abs().mean(1).square().sum(0).sqrt()
    torch.testing.assert_close(found["residual"], hidden, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sequence", ["mean", "l2", "variance"])
@pytest.mark.parametrize("batch", ["mean", "l2", "variance"])
def test_activations_are_summed_up_over_the_window_and_then_over_windows(
    sequence: Any, batch: Any
) -> None:
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    how = {
        "mean": lambda v, d: v.mean(d),
        "l2": lambda v, d: v.square().sum(d).sqrt(),
        "variance": lambda v, d: v.var(d, unbiased=False),
    }
    seen = Activations(2, 4, "cpu", sequence=sequence, batch=batch, whole=True)
    seen.see(x[:4].float())
    seen.see(x[4:].float())
    sizes = x.view(6, 5, 2, 2).norm(dim=-1)
    expected = how[batch](how[sequence](sizes, 1), 0)
    torch.testing.assert_close(seen.result(), expected, rtol=1e-4, atol=1e-5)
    routed = Activations(4, 4, "cpu", sequence=sequence, batch=batch, whole=False)
    routed.see(x[:2].float().view(1, 10, 4))
    routed.see(x[2:].float().view(1, 20, 4))
    expected = how[sequence](x.view(30, 4).abs(), 0)
    torch.testing.assert_close(routed.result(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_wanda_l2_is_the_square_of_what_the_output_loses(model_type: str, made: Any) -> None:
    tiny, view = made(model_type)
    found = measured(StructuredWanda(ffn=0.5), view)
    down = role(tiny, 2, "down")
    x = inputs_of(tiny, down.name).flatten(0, 1)
    weight = as_matrix(down, view.checkpoint.read(down.name)).double()
    lost = torch.stack([(x[:, j, None] * weight[:, j]).square().sum() for j in range(x.shape[1])])
    torch.testing.assert_close(found["mlp.2"], lost, rtol=1e-3, atol=1e-4)


def test_magnitude_counts_everything_that_a_unit_is_part_of(made: Any) -> None:
    tiny, view = made("llama")
    found = StructuredMagnitude(ffn=0.5, kv_groups=0.5, norm="l1").scores_before(view)
    w = {t.role: view.checkpoint.read(t.name).abs() for t in tiny.arch.block(1)}
    mlp = w["gate"].sum(1) + w["up"].sum(1) + w["down"].sum(0)
    torch.testing.assert_close(found["mlp.1"].float(), mlp)
    q, o = w["q"].view(2, 2, 8, 32).sum((2, 3)), w["o"].view(32, 2, 2, 8).sum((0, 3))
    shared = (w["k"] + w["v"]).view(2, 8, 32).sum((1, 2))[:, None] / 2
    torch.testing.assert_close(found["kv.1"].float(), q + o + shared)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("importance", ["vector", "first", "fisher", "mixed"])
def test_taylor_scores_equal_autograd(model_type: str, importance: Any, made: Any) -> None:
    tiny, view = made(model_type)
    found = LlmPruner(ffn=0.5, importance=importance, aggregate="max").scores_before(view)
    model = tiny.model.float()
    weights = {
        r: model.get_parameter(role(tiny, 3, r).name)
        for r in ("gate", "up", "gate_up", "down")
        if any(t.role == r for t in tiny.arch.block(3))
    }
    grads = {r: [] for r in weights}
    for window in IDS:
        logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:])
        for r, grad in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            grads[r].append(grad.double())
    parts = []
    for r, weight in weights.items():
        w = weight.detach().double()
        first = w * sum(grads[r]) / len(IDS)
        second = w.square() * sum(g.square() for g in grads[r]) / len(IDS) / 2
        value = {
            "vector": first,
            "first": first.abs(),
            "fisher": second,
            "mixed": (first - second).abs(),
        }[importance]
        value = as_matrix(role(tiny, 3, r), value)
        if r == "down":
            parts.append(value.sum(0))
        elif r == "gate_up":
            parts.append(value.sum(1).view(2, -1).sum(0))
        else:
            parts.append(value.sum(1))
    expected = torch.stack(parts).abs().amax(0)
    scale = float(expected.max())
    torch.testing.assert_close(found["mlp.3"], expected, rtol=2e-3, atol=1e-4 * scale)


def test_gblm_without_gradients_is_wanda(made: Any) -> None:
    _, view = made("llama")
    gblm = measured(StructuredGblm(ffn=0.5, alpha=0.0), view)
    wanda = measured(StructuredWanda(ffn=0.5, norm="l1"), view)
    for axis, scores in gblm.items():
        torch.testing.assert_close(scores / scores.sum(), wanda[axis] / wanda[axis].sum())
    assert not StructuredGblm(ffn=0.5, alpha=0.0).scores_before(view)["mlp.0"].any()


def test_gblm_adds_what_gradients_say(made: Any) -> None:
    tiny, view = made("llama")
    found = StructuredGblm(ffn=0.5, alpha=2.0).scores_before(view)["mlp.2"]
    down = tiny.model.float().get_parameter(role(tiny, 2, "down").name)
    sizes = torch.zeros_like(down)
    for window in IDS:
        logits = tiny.model(window[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, window[1:])
        sizes += torch.autograd.grad(loss, down)[0].abs()
    expected = (down.abs() * sizes).sum(0).detach().double() / len(IDS) * 2.0 * 128 / 10**0.5
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("method", [Minitron, StructuredWanda, StructuredMagnitude, LlmPruner])
def test_units_that_do_nothing_go_first_and_nothing_changes(method: Any, tmp_path: Path) -> None:
    """Half of the channels and one head of each group are made idle; they are what goes."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from prune_export.surgery import rewrite

    tiny = random_model("llama", {}, tmp_path / "model")
    state = load_file(tiny.path / "model.safetensors")
    random = torch.Generator().manual_seed(5)
    for layer in range(tiny.arch.layers):
        idle = torch.randperm(48, generator=random)[:24]
        prefix = f"model.layers.{layer}"
        for name in ("gate_proj", "up_proj"):
            state[f"{prefix}.mlp.{name}.weight"][idle] = 0
        state[f"{prefix}.mlp.down_proj.weight"][:, idle] = 0
        for group in range(2):
            head = 2 * group + int(torch.randint(2, (1,), generator=random))
            rows = slice(8 * head, 8 * head + 8)
            state[f"{prefix}.self_attn.q_proj.weight"][rows] = 0
            state[f"{prefix}.self_attn.o_proj.weight"][:, rows] = 0
    save_file(state, tiny.path / "model.safetensors", {"format": "pt"})
    checkpoint = Checkpoint.open(tiny.path)
    view = ModelView(
        tiny.arch,
        checkpoint,
        {},
        CalibrationContext(TokenSet.of(IDS), MACHINE, tmp_path / "scratch"),
    )
    # Minitron's heads count by what they give to the projection, be it idle or not.
    own = method(ffn=0.5, compensate=False) if method is Minitron else method(ffn=0.5, heads=0.5)
    edits = own.decide(view).edits
    rewrite(checkpoint, tiny.arch, edits, tmp_path / "out", ram_bytes=1 << 30)
    logits = []
    for path in (tiny.path, tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            logits.append(model(IDS, use_cache=False).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "axes", "names"),
    [
        ("llama", ("mlp.1",), ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
        ("llama", ("kv.1",), [f"self_attn.{one}_proj" for one in "qkvo"]),
        ("gpt2", ("kv.1",), ["attn.c_attn", "attn.c_proj"]),
        ("mixtral", ("moe.1.3",), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("mixtral", ("expert.1",), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("mixtral", ("kv.1",), [f"self_attn.{one}_proj" for one in "qkvo"]),
        ("llama", ("mlp.2",), []),
    ],
)
def test_gradients_are_wanted_only_of_matrices_that_hold_the_units(
    model_type: str, axes: tuple[str, ...], names: list[str], made: Any
) -> None:
    tiny, _ = made(model_type)
    reader = UnitReader(tiny.arch, axes, "some", ("sum",), lambda weight, _: weight)
    block = tiny.model.get_submodule(tiny.arch.table.blocks)[1]
    wanted = [name for name, _ in block.named_parameters() if reader.wants(1, name)]
    assert sorted(name.removesuffix(".weight") for name in wanted) == sorted(names)
