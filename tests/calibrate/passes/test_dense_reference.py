"""Targets of a sweep beside the dense model, against two whole transformers models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.table import tables
from prune_export.calibrate import (
    CalibrationContext,
    Edited,
    LinearGroup,
    Order,
    TokenSet,
    run_sequential,
)
from prune_export.calibrate.passes.dense_reference import MIXERS, added_times, has_target
from prune_export.calibrate.streaming import checkpointing
from prune_export.calibrate.streaming.linear_groups import linear_groups
from prune_export.machine import Machine
from tests.arch.kinds import HALF_BLOCKS
from tests.arch.tiny_models import name_in_memory

pytestmark = pytest.mark.usefixtures("small_sweeps")


@dataclass
class Seen:
    states: list[torch.Tensor] = field(default_factory=list)
    wanted: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)

    def see(self, states: torch.Tensor) -> None:
        self.states.append(states.clone())

    def see_with_target(
        self, states: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self.see(states)
        self.wanted.append(wanted.clone())
        self.weights.append(weights.clone())


@dataclass
class Bends:
    """Multiplies every matrix, those with a target by something that depends on it."""

    seen: dict[tuple[int, str], Seen] = field(default_factory=dict)
    fails_at: int = -1

    @property
    def key(self) -> str:
        return "bends"

    def watch(self, group: LinearGroup, width: int, device: str) -> Seen:
        del width, device
        if group.layer == self.fails_at:
            raise KeyboardInterrupt
        return Seen()

    def edit(self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: Seen) -> Edited:
        self.seen[group.layer, group.name] = seen
        factor = 0.6
        if seen.wanted:
            factor += 0.3 * float(torch.tanh(torch.cat(seen.wanted).mean()))
        return Edited({n: w * factor for n, w in weights.items()}, {"factor": factor})


def caught(model: Any, blocks: str, layer: int, path: str, ids: torch.Tensor) -> Any:
    """What enters and leaves a block, and what a matrix in it gives."""
    block, found = model.get_submodule(blocks)[layer], {}

    def keep(name: str, value: Any) -> None:
        value = value[0] if isinstance(value, tuple) else value
        found[name] = value.detach().clone()

    with ExitStack() as hooks, torch.no_grad():
        for handle in (
            block.register_forward_pre_hook(
                lambda _, a, k: keep("in", a[0] if a else k["hidden_states"]), with_kwargs=True
            ),
            block.register_forward_hook(lambda _, a, out: keep("out", out)),
            model.get_submodule(path).register_forward_hook(lambda _, a, out: keep("own", out)),
        ):
            hooks.callback(handle.remove)
        model(ids, use_cache=False)
    found["own"] = found["own"].view(found["in"].shape)
    return found


VARIANTS = [
    (name, said)
    for name, table in sorted(tables().items())
    for said in ({}, *(table.tiny.variants.values() if name in ("gpt_neox", "opt") else ()))
    if not name.startswith("sliced_")
]


def modes() -> list[Any]:
    cases = [pytest.param(name, said, "parked", id=f"{name}-{n}") for n, (name, said) in
             enumerate(VARIANTS)]  # fmt: skip
    return cases + [
        pytest.param("llama", {}, mode, id=mode) for mode in ("repeated", "block", "spooled")
    ]


@pytest.mark.parametrize(("model_type", "said", "mode"), modes(), indirect=["mode"])
def test_a_target_brings_the_states_back_to_the_dense_models(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    said: dict[str, Any],
    mode: str,
) -> None:
    made = twin(model_type, **said)
    times = added_times(made.arch)
    if times is None:
        with pytest.raises(ValueError, match="not simply added"):
            run_sequential(
                made.checkpoint, Bends(), CalibrationContext(tokens, machine), dense=True
            )
        return
    if mode == "spooled":
        machine = replace(machine, ram_bytes=0)
    order: Order = "block" if mode == "block" else "sequential"
    editor = Bends()
    swept = run_sequential(
        made.checkpoint, editor, CalibrationContext(tokens, machine), order=order, dense=True
    )
    arch, dense, edited = made.arch, made.model, deepcopy(made.model)
    aimed = 0
    for layer in range(arch.layers):
        if any(group.expert is not None for group in linear_groups(arch, layer)):
            # Experts are in one tensor: what their sites see is tested with the sweep itself.
            assert not any(s.wanted for (_, n), s in editor.seen.items() if "experts" in n)
            mixers = [n for at, n in editor.seen if at == layer and n in MIXERS]
            assert len(mixers) == (model_type not in HALF_BLOCKS)
            assert all(editor.seen[layer, mixer].wanted for mixer in mixers)
            return
        for group in linear_groups(arch, layer):
            seen = editor.seen[layer, group.name]
            path = name_in_memory(arch, group.tensors[0].name).removesuffix(".weight")
            if not has_target(group):
                assert not seen.wanted
            else:
                at = (arch.table.blocks, layer, path, tokens.ids)
                was, now = caught(dense, *at), caught(edited, *at)
                bias = getattr(dense.get_submodule(path), "bias", None)
                # The edited model, but for what this matrix gives: what is added to it.
                if group.kind == "mlp.out":
                    goal, before = was["out"], now["out"] - times * now["own"]
                else:
                    goal, before = was["in"] + times * was["own"], now["in"]
                expected = (goal - before) / times - (0 if bias is None else bias)
                torch.testing.assert_close(torch.cat(seen.wanted), expected, atol=5e-4, rtol=5e-4)
                weights = 1 / goal.square().mean(-1)
                torch.testing.assert_close(torch.cat(seen.weights), weights, atol=0, rtol=1e-3)
                aimed += 1
            if order == "sequential":
                bend(edited, arch, group, swept.logs[layer][group.name]["factor"])
        if order == "block":
            for group in linear_groups(arch, layer):
                bend(edited, arch, group, swept.logs[layer][group.name]["factor"])
    # The output of experts that are one tensor is no linear layer's.
    fused = {tensor.layer for tensor in arch.tensors if tensor.role == "experts.down"}
    assert aimed == 2 * arch.layers - len(fused)


def bend(model: Any, arch: Any, group: LinearGroup, factor: float) -> None:
    for tensor in group.tensors:
        path = name_in_memory(arch, tensor.name).removesuffix(".weight")
        model.get_submodule(path).weight.data *= factor


@pytest.mark.slow
def test_every_table_says_whether_outputs_are_added(twin: Callable[..., Any]) -> None:
    """Others' are normalized or scaled first; the test above proves those that are added."""
    added = {
        name: added_times(twin(name).arch) for name in tables() if not name.startswith("sliced_")
    }
    assert {name for name, times in added.items() if times is None} == {
        "exaone4", "falcon_h1", "flex_olmo", "gemma2", "gemma3_text", "gemma4_text", "glm4",
        "hyperclovax", "minicpm3", "olmo2", "olmo3",
    }  # fmt: skip
    assert {name for name, times in added.items() if times == 0.5} == {
        "granite", "granitemoe", "granitemoehybrid", "granitemoeshared",
    }  # fmt: skip
    assert added_times(twin("opt", do_layer_norm_before=False).arch) is None


def test_a_killed_sweep_goes_on_beside_the_dense_model(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, tmp_path: Path
) -> None:
    made = twin("llama")
    whole = run_sequential(
        made.checkpoint, Bends(), CalibrationContext(tokens, machine), dense=True
    )
    plain = run_sequential(made.checkpoint, Bends(), CalibrationContext(tokens, machine))
    assert whole.logs != plain.logs
    killed, scratch = Bends(fails_at=3), tmp_path / "scratch"
    for spooled in (machine, replace(machine, ram_bytes=0)):
        with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpointing, "INTERVAL_SECONDS", 0.0)
            patch.setattr(checkpointing, "_SHARE", 0)
            run_sequential(
                made.checkpoint,
                killed,
                CalibrationContext(tokens, spooled, scratch=scratch),
                dense=True,
            )
        again = Bends()
        found = run_sequential(
            made.checkpoint, again, CalibrationContext(tokens, spooled, scratch=scratch), dense=True
        )
        assert min(layer for layer, _ in again.seen) == 3, "it began again"
        for name, read in whole.values():
            assert torch.equal(read(), found.read(name))
        assert found.logs == whole.logs
        for file in scratch.rglob("*"):
            if file.is_file():
                file.unlink()
