"""Streamed gradients equal plain autograd on the whole model, for every family; resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.table import tables
from prune_export.calibrate import CalibrationContext, Sums, TokenSet, as_matrix, gradients, linears
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.calibrate.streaming.linear_groups import part_of
from prune_export.machine import Machine

KINDS = ("sum", "abs", "square")


@dataclass
class Everything:
    """Keeps all sums of all parameters."""

    kinds: tuple[Any, ...] = KINDS
    fails_at: int = -1
    kept: list[int] = field(default_factory=list)

    @property
    def key(self) -> str:
        return "everything"

    def wants(self, layer: int, name: str) -> bool:
        return True

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        if layer == self.fails_at:
            raise KeyboardInterrupt
        self.kept.append(layer)
        assert {n: p.shape for n, p in parameters.items()} == {
            n: s[self.kinds[0]].shape for n, s in sums.items()
        }
        return {f"{name} {kind}": s for name, own in sums.items() for kind, s in own.items()}


@pytest.mark.families("roles")
@pytest.mark.parametrize("model_type", sorted(tables()))
def test_gradients_equal_autograd(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, model_type: str
) -> None:
    made = twin(model_type)
    found = gradients(made.checkpoint, Everything(), CalibrationContext(tokens, machine))
    expected: dict[str, dict[str, torch.Tensor]] = {}
    losses = []
    blocks = made.model.get_submodule(made.arch.table.blocks)
    for window in tokens.ids:
        made.model.zero_grad()
        logits = made.model(window[None], use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, window[1:])
        loss.backward()
        losses.append(float(loss.detach()))
        for layer, block in enumerate(blocks):
            for name, parameter in block.named_parameters():
                # An expert that no token of the window was sent to has no gradient.
                g = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                own = expected.setdefault(f"{layer} {name}", dict.fromkeys(KINDS, 0.0))
                for kind, part in (("sum", g), ("abs", g.abs()), ("square", g**2)):
                    own[kind] = own[kind] + part
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for layer in range(made.arch.layers):
        kept = found.block(layer)
        for key, tensor in kept.items():
            name, kind = key.split()
            wanted = expected[f"{layer} {name}"][kind]
            limit = 2e-4 * float(wanted.abs().max()) + 1e-7
            torch.testing.assert_close(tensor, wanted, atol=limit, rtol=2e-3)


def test_sums_alone_come_in_batches_and_are_the_same(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("qwen3")
    one = gradients(made.checkpoint, Everything(), CalibrationContext(tokens, machine)).block(2)
    other = gradients(
        made.checkpoint, Everything(kinds=("sum",)), CalibrationContext(tokens, machine)
    ).block(2)
    for key, tensor in other.items():
        torch.testing.assert_close(tensor, one[key], atol=1e-5, rtol=1e-4)


def test_a_killed_pass_goes_on_and_ends_in_the_same_bytes(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, tmp_path: Path
) -> None:
    made = twin("llama")
    whole = gradients(made.checkpoint, Everything(), CalibrationContext(tokens, machine))
    with pytest.raises(KeyboardInterrupt):
        gradients(
            made.checkpoint,
            Everything(fails_at=2),
            CalibrationContext(tokens, machine, scratch=tmp_path),
        )
    again = Everything()
    found = gradients(made.checkpoint, again, CalibrationContext(tokens, machine, scratch=tmp_path))
    assert again.kept == [2, 1, 0], "it began again"
    assert found.loss == whole.loss
    for layer in range(made.arch.layers):
        own = whole.block(layer)
        for key, tensor in found.block(layer).items():
            assert torch.equal(tensor, own[key])
    assert not list(tmp_path.rglob("*.spool")), "the spools are left behind"


@dataclass
class Summed:
    """Keeps the sums under the parameters' own names."""

    kinds: tuple[Any, ...] = ("sum",)
    key: str = "summed"

    def wants(self, layer: int, name: str) -> bool:
        return True

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        return {name: own["sum"] for name, own in sums.items()}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral", "qwen3_moe"])
def test_a_stored_matrix_finds_its_own_gradient(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, model_type: str
) -> None:
    made = twin(model_type)
    found = gradients(made.checkpoint, Summed(), CalibrationContext(tokens, machine))
    made.model.zero_grad()
    for window in tokens.ids:
        logits = made.model(window[None], use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, window[1:]).backward()
    for tensor in linears(made.arch):
        name = found.names[tensor.name]
        whole = made.model.get_parameter(f"{made.arch.table.blocks}.{tensor.layer}.{name}")
        stored = as_matrix(tensor, made.checkpoint.read(tensor.name))
        inside = as_matrix(tensor, part_of(tensor, whole.data))
        assert torch.equal(inside, stored), f"{tensor.name} is another part"
        assert whole.grad is not None
        expected = as_matrix(tensor, part_of(tensor, whole.grad))
        limit = 2e-4 * float(whole.grad.abs().max()) + 1e-7
        torch.testing.assert_close(found.matrix(tensor), expected, atol=limit, rtol=2e-3)


@dataclass
class Some:
    """Keeps the sums of the matrices of some blocks."""

    layers: tuple[int, ...]
    kinds: tuple[Any, ...] = ("sum",)
    fails_at: int = -1

    @property
    def key(self) -> str:
        return f"some {self.layers}"

    def wants(self, layer: int, name: str) -> bool:
        return layer in self.layers and name.endswith("proj.weight")

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        if layer == self.fails_at:
            raise KeyboardInterrupt
        return {name: own["sum"] for name, own in sums.items()}


def test_the_way_back_ends_at_the_first_block_of_which_something_is_wanted(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = twin("llama")
    whole = gradients(
        made.checkpoint, Everything(kinds=("sum",)), CalibrationContext(tokens, machine)
    )
    real, ran = LayerwiseModel.run, []

    def counted(self: LayerwiseModel, layer: int, *args: Any) -> torch.Tensor:
        ran.append(layer)
        return real(self, layer, *args)

    monkeypatch.setattr(LayerwiseModel, "run", counted)
    found = gradients(
        made.checkpoint, Some((2, 4)), CalibrationContext(tokens, machine, scratch=tmp_path / "one")
    )
    assert ran == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2]
    assert found.first == 2
    assert found.loss == whole.loss
    for layer in (2, 4):
        for name, sums in found.block(layer).items():
            expected = whole.block(layer)[f"{name} sum"]
            torch.testing.assert_close(sums, expected, atol=1e-5, rtol=1e-4)
    # Killed on its way, it ends in the same bytes; ended, it is not run again.
    two = tmp_path / "two"
    with pytest.raises(KeyboardInterrupt):
        gradients(
            made.checkpoint,
            Some((2, 4), fails_at=2),
            CalibrationContext(tokens, machine, scratch=two),
        )
    again = gradients(
        made.checkpoint, Some((2, 4)), CalibrationContext(tokens, machine, scratch=two)
    )
    assert all(torch.equal(again.block(2)[name], own) for name, own in found.block(2).items())
    ran.clear()
    gradients(made.checkpoint, Some((2, 4)), CalibrationContext(tokens, machine, scratch=two))
    assert not ran
    assert not list(tmp_path.rglob("*.spool"))


def test_of_no_block_wanted_the_loss_is_left(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("llama")
    found = gradients(made.checkpoint, Some(()), CalibrationContext(tokens, machine))
    assert found.loss == pytest.approx(made.loss(tokens.ids), rel=1e-5)
    assert found.first == 6
