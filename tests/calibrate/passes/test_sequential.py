"""Sweeps against brute force: the inputs that an editor sees, in either order, parked or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.roles import role
from prune_export.arch.table import tables
from prune_export.calibrate import (
    LINEAR_GROUPS,
    CalibrationContext,
    Edited,
    Hessian,
    LinearGroup,
    Order,
    TokenSet,
    linear_groups,
    linears,
    run_sequential,
)
from prune_export.calibrate.streaming import checkpointing
from prune_export.machine import Machine
from tests.arch.tiny_models import name_in_memory

pytestmark = pytest.mark.usefixtures("small_sweeps")


@dataclass
class Halves:
    """Halves every matrix it edits, and keeps what it saw."""

    only: tuple[str, ...] = tuple(LINEAR_GROUPS.values())
    grams: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    fails_at: int = -1

    @property
    def key(self) -> str:
        return "halves"

    def watch(self, site: LinearGroup, width: int, device: str) -> Hessian | None:
        if site.layer == self.fails_at:
            raise KeyboardInterrupt
        return Hessian(width, device) if site.kind in self.only else None

    def edit(self, site: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Hessian) -> Edited:
        self.grams[site.layer, site.name] = seen.sums.clone()
        return Edited({n: w / 2 for n, w in weights.items()}, {"tokens": seen.tokens})


def by_hand(made: Any, ids: torch.Tensor, order: Order) -> dict[tuple[int, str], torch.Tensor]:
    """The same with a whole transformers model: one forward pass a site, or a block."""
    model, arch = made.model, made.arch
    names = {
        tensor.name: model.get_submodule(tensor.name.removesuffix(".weight"))
        for layer in range(arch.layers)
        for site in linear_groups(arch, layer)
        for tensor in site.tensors
    }
    found = {}
    for layer in range(arch.layers):
        sites = linear_groups(arch, layer)
        groups = [[site] for site in sites] if order == "sequential" else [list(sites)]
        for group in groups:
            seen: dict[str, torch.Tensor] = {}
            handles = [
                names[site.tensors[0].name].register_forward_pre_hook(
                    lambda _, args, name=site.name, into=seen: into.__setitem__(name, args[0])
                )
                for site in group
            ]
            with torch.no_grad():
                model(ids, use_cache=False)
            for handle in handles:
                handle.remove()
            for site in group:
                rows = seen[site.name].flatten(0, -2)
                found[layer, site.name] = rows.T @ rows
                for tensor in site.tensors:
                    names[tensor.name].weight.data /= 2
    return found


DENSE = sorted(name for name, table in tables().items() if "expert" not in table.axes)
MOE = sorted(tables().keys() - set(DENSE))


@pytest.mark.families("each", "mode")
@pytest.mark.parametrize("mode", ["parked", "repeated", "block"], indirect=True)
@pytest.mark.parametrize("model_type", DENSE)
def test_an_editor_sees_the_inputs_of_the_edited_model(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    mode: str,
) -> None:
    made = twin(model_type)
    order: Order = "block" if mode == "block" else "sequential"
    editor = Halves()
    swept = run_sequential(
        made.checkpoint, editor, CalibrationContext(tokens, machine), order=order
    )
    expected = by_hand(made, tokens.ids, order)
    assert editor.grams.keys() == expected.keys()
    for key, gram in expected.items():
        torch.testing.assert_close(editor.grams[key], gram, atol=2e-3, rtol=2e-4)
    for name, read in swept.values():
        torch.testing.assert_close(read(), made.checkpoint.read(name) / 2)
    assert dict(swept.values()).keys() == {tensor.name for tensor in linears(made.arch)}
    for log in swept.logs[0].values():
        assert log["tokens"] == tokens.ids.numel()


def stack_of(module: Any) -> torch.Tensor | None:
    """What all experts of a block read their states with, in one tensor; None of other modules."""
    if not hasattr(module, "has_gate"):
        return None
    found: torch.Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    return found


@pytest.mark.families("each", "mode")
@pytest.mark.parametrize("mode", ["parked", "repeated", "block"], indirect=True)
@pytest.mark.parametrize("model_type", MOE)
def test_an_expert_sees_the_tokens_routed_to_it(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    mode: str,
) -> None:
    made = twin(model_type)
    editor = Halves()
    swept = run_sequential(
        made.checkpoint,
        editor,
        CalibrationContext(tokens, machine),
        order="block" if mode == "block" else "sequential",
    )
    assert dict(swept.values()).keys() == {tensor.name for tensor in linears(made.arch)}
    for name, read in swept.values():
        torch.testing.assert_close(read(), made.checkpoint.read(name) / 2)
    # By hand, in the first block with experts: what each expert's matrices are given.
    every = [linear_groups(made.arch, layer) for layer in range(made.arch.layers)]
    sites = next(sites for sites in every if any(site.expert is not None for site in sites))
    layer = sites[0].layer
    block = made.model.get_submodule(made.arch.table.blocks)
    (experts,) = [m for m in block[layer].modules() if stack_of(m) is not None]
    with torch.no_grad():
        halves = [group for sites in every[:layer] for group in sites if group.expert is None]
        for module in (module for before in block[:layer] for module in before.modules()):
            if (stack := stack_of(module)) is not None:
                stack /= 2
                module.down_proj /= 2
        if mode != "block":
            halves += [site for site in sites if role(site.tensors[0].role).part == "attention"]
        for tensor in (tensor for group in halves for tensor in group.tensors):
            made.model.get_parameter(name_in_memory(made.arch, tensor.name)).div_(2)
        caught: list[tuple[torch.Tensor, ...]] = []
        experts.register_forward_pre_hook(lambda _, args: caught.append(args))
        made.model(tokens.ids, use_cache=False)
        states, chosen, _ = caught[0]
        first = stack_of(experts)
        assert first is not None
        for expert in range(len(first)):
            own = states[(chosen == expert).any(-1)]
            torch.testing.assert_close(
                editor.grams[layer, f"experts.in.{expert}"], own.T @ own, atol=2e-3, rtol=2e-4
            )
            halved = 1.0 if mode == "block" else 0.5
            inner = own @ (halved * first[expert]).T
            if experts.has_gate:
                gate, up = inner.chunk(2, -1)
                inner = experts.act_fn(gate) * up
            else:
                inner = experts.act_fn(inner)
            torch.testing.assert_close(
                editor.grams[layer, f"experts.out.{expert}"], inner.T @ inner, atol=2e-3, rtol=2e-4
            )


def test_a_killed_sweep_goes_on_and_ends_in_the_same_bytes(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, tmp_path: Path
) -> None:
    made = twin("llama")
    whole = run_sequential(made.checkpoint, Halves(), CalibrationContext(tokens, machine))
    killed, scratch = Halves(fails_at=4), tmp_path / "scratch"
    for spooled in (machine, replace(machine, ram_bytes=0)):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpointing, "INTERVAL_SECONDS", 0.0)
            patch.setattr(checkpointing, "_SHARE", 0)
            run_sequential(
                made.checkpoint, killed, CalibrationContext(tokens, spooled, scratch=scratch)
            )
        again = Halves()
        found = run_sequential(
            made.checkpoint, again, CalibrationContext(tokens, spooled, scratch=scratch)
        )
        assert min(layer for layer, _ in again.grams) == 4, "it began again"
        for name, read in whole.values():
            assert torch.equal(read(), found.read(name))
        assert found.logs == whole.logs
        for file in scratch.rglob("*"):
            if file.is_file():
                file.unlink()
