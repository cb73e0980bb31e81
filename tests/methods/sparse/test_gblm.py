"""GBLM's scores against the formulas, plain autograd, and Wanda."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_export.calibrate import (
    InputNorms,
    as_matrix,
    linears,
)
from prune_export.machine import Machine
from prune_export.methods.sparse.gblm import Gblm, Norms, score
from prune_export.methods.sparse.wanda import Wanda
from prune_export.pruning.sparse.masks import mask_of
from prune_export.sparsity.nm import Nm
from tests.arch.tiny_models import random_model
from tests.views import random_ids, view_of

MACHINE = Machine("cpu", 8 << 30, 0, 1)
IDS = random_ids(4, 10, 1)


def found_by(method: Gblm, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The method's scores from inputs `[windows, tokens, in]`, gradients `[windows, out, in]`."""
    seen = InputNorms(x.shape[-1], "cpu")
    seen.see(x)
    reader = Norms(method.norm, len(x))
    kind = reader.kinds[0]
    sums = (g.abs() if kind == "abs" else g**2).sum(0)
    (kept,) = reader.keep(0, {"w": {kind: sums}}, {"w": weight}).values()
    return score(weight, seen, kept, method.share(seen.tokens, len(x)))


def by_formula(
    method: Gblm, x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """As published, for the windows at hand, in float64."""
    x, g, weight = x.double(), g.double(), weight.double()
    of_input = (x**2).sum((0, 1))
    if method.alpha_convention == "released":
        # A running mean over windows, and alpha in each gradient before it is accumulated.
        of_input = of_input / len(x)
        scaled = method.alpha * g
        of_loss = scaled.abs().sum(0) if method.norm == "l1" else (scaled**2).sum(0).sqrt()
    else:
        of_loss = method.alpha * (g.abs().sum(0) if method.norm == "l1" else g.norm(dim=0))
    return weight.abs() * (of_input.sqrt() + of_loss)


def drawn(windows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(windows, 3, 12, generator=random)
    g = 1e-2 * torch.randn(windows, 6, 12, generator=random)
    return x, g, torch.randn(6, 12, generator=random)


@pytest.mark.parametrize("windows", [1, 4, 128])
@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_scores_are_those_of_the_released_code(norm: Any, convention: Any, windows: int) -> None:
    """Of the windows at hand: gradients of few of them must not count as those of 128."""
    method = Gblm(sparsity=0.5, norm=norm, alpha_convention=convention)
    x, g, weight = drawn(windows)
    ours, theirs = found_by(method, x, g, weight).double(), by_formula(method, x, g, weight)
    torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("windows", "counted"), [(5, 5), (128, 128), (500, 128)])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_conventions_differ_by_the_root_of_the_windows(
    norm: Any, windows: int, counted: int
) -> None:
    paper = Gblm(sparsity=0.5, norm=norm, alpha=100 * sqrt(counted), alpha_convention="paper")
    released = Gblm(sparsity=0.5, norm=norm, alpha=100)
    tokens = 6 * windows
    assert paper.share(tokens, windows) == pytest.approx(released.share(tokens, windows))


@pytest.mark.parametrize("convention", ["released", "paper"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_more_windows_than_alpha_was_published_with_change_nothing(
    norm: Any, convention: Any
) -> None:
    method = Gblm(sparsity=0.5, norm=norm, alpha_convention=convention)
    x, g, weight = drawn(128)
    once = found_by(method, x, g, weight)
    again = found_by(method, x.repeat(3, 1, 1), g.repeat(3, 1, 1), weight)
    torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_without_gradients_a_score_is_wanda_s_bit_for_bit(seed: int, dtype: torch.dtype) -> None:
    from prune_export.methods.sparse import wanda

    x, g, weight = drawn(3, seed)
    weight = weight.to(dtype).float()
    seen = InputNorms(12, "cpu")
    seen.see(x)
    assert torch.equal(score(weight, seen, g[0].abs(), 0.0), wanda.score(weight, seen))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"nm": Nm(2, 4)}])
def test_alpha_zero_is_wanda(model_type: str, amount: dict[str, Any], tmp_path: Path) -> None:
    tiny = random_model(model_type, {}, tmp_path / "model")
    decisions = [
        method.decide(view_of(tiny, IDS, tmp_path / name))
        for name, method in (("a", Gblm(alpha=0, **amount)), ("b", Wanda(**amount)))
    ]
    assert decisions[0].log["mask_digest"] == decisions[1].log["mask_digest"]
    for ours, theirs in zip(*(decision.edits for decision in decisions), strict=True):
        assert ours.tensor == theirs.tensor
        assert torch.equal(ours.value(), theirs.value())


def test_vanishing_gradients_are_wanda_too(tmp_path: Path) -> None:
    """Norms in the true order are corrected for the noise of pruning, whatever alpha is."""
    tiny = random_model("llama", {}, tmp_path / "model")
    digests = [
        method.decide(view_of(tiny, IDS, tmp_path / name)).log["mask_digest"]
        for name, method in (
            ("a", Gblm(alpha=1e-30, nm=Nm(2, 4))),
            ("b", Wanda(nm=Nm(2, 4))),
        )
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_masks_equal_those_of_autograd_on_the_whole_model(
    model_type: str, norm: Any, tmp_path: Path
) -> None:
    tiny = random_model(model_type, {}, tmp_path / "model")
    method = Gblm(sparsity=0.5, norm=norm, order="block", alpha=3.0)
    decision = method.decide(view_of(tiny, IDS, tmp_path))
    values = {edit.tensor: edit.value() for edit in decision.edits}

    model = tiny.model.float()
    inputs: dict[str, list[torch.Tensor]] = {}
    names = [tensor.name for tensor in linears(tiny.arch) if tensor.layer == 0]
    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.register_forward_hook(
            lambda _m, args, _o, name=name: inputs.setdefault(name, []).append(args[0].detach())
        )
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for window in IDS:
        model.zero_grad()
        logits = model(window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:]).backward()
        for name in names:
            gradients[name].append(model.get_parameter(name).grad)
    compared = 0
    for tensor in linears(tiny.arch):
        if tensor.layer != 0:
            continue
        weight = as_matrix(tensor, tiny.model.get_parameter(tensor.name).detach())
        g = torch.stack([as_matrix(tensor, one) for one in gradients[tensor.name]])
        x = torch.cat(inputs[tensor.name])
        expected = by_formula(method, x, g, weight)
        mask = ~mask_of(expected.float().contiguous(), 0.5)
        found = as_matrix(tensor, values[tensor.name]) == 0
        assert torch.equal(mask, found), tensor.name
        plain = ~mask_of(by_formula(Gblm(sparsity=0.5, alpha=0), x, g, weight).float(), 0.5)
        compared += int((plain != found).sum())
    assert compared > 0, "gradients changed nothing: the test is blind"
