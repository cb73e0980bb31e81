"""The pass that mends seams, against whole transformers models with hooks on their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.table import tables
from prune_export.calibrate import CalibrationContext, TokenSet
from prune_export.calibrate.passes import seam_fit, seam_refit
from prune_export.calibrate.passes.dense_reference import added_times
from prune_export.calibrate.passes.seam_fit import Mended, Moments, mended
from prune_export.calibrate.passes.seam_refit import CutModel, held_out, repair
from prune_export.calibrate.passes.seams import seams_of
from prune_export.calibrate.streaming import checkpointing, driver
from prune_export.calibrate.streaming.skip import OUTPUTS, Unit
from prune_export.machine import Machine
from tests.arch.tiny_models import name_in_memory

NORMED = {
    "exaone4", "falcon_h1", "flex_olmo", "gemma2", "gemma3_text", "gemma4_text", "glm4",
    "hyperclovax", "minicpm3", "olmo2", "olmo3",
}  # fmt: skip
ADDED = [name for name in sorted(tables()) if name not in NORMED
         and not name.startswith("sliced_")]  # fmt: skip


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four windows at once, so that 21 fitted ones and three held out make ragged batches."""
    monkeypatch.setattr(driver, "BATCH_TOKENS", {"cpu": 48})
    # Of so few tokens, little is learnt of what random models do.
    monkeypatch.setattr(seam_fit, "RIDGES", (10.0, 1.0, 0.1))


@pytest.fixture
def tokens() -> TokenSet:
    """24 windows of twelve tokens."""
    return TokenSet.of(torch.randint(2, 64, (24, 12), generator=torch.Generator().manual_seed(7)))


def cut_of(made: Any, units: Sequence[Unit]) -> CutModel:
    dropped = frozenset(unit.layer for unit in units if unit.part == "block")
    zeros = {
        tensor.name: partial(torch.zeros, made.arch.shape(tensor))
        for unit in units
        if unit.part != "block"
        for tensor in made.arch.block(unit.layer)
        if tensor.role in OUTPUTS[unit.part]
    }
    return CutModel(dropped, zeros)


def without(model: Any, arch: Any, cut: CutModel) -> Any:
    """A copy of a whole model with what the cut says; blocks that go hand on what they get."""
    copied = deepcopy(model)
    for name in cut.values:
        copied.get_parameter(name).data.zero_()
    for layer in cut.dropped:
        block = copied.get_submodule(arch.table.blocks)[layer]
        block.register_forward_hook(_unchanged, with_kwargs=True)
    return copied


def _unchanged(_module: Any, args: Any, named: Any, output: Any) -> Any:
    states = args[0] if args else named["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def states_after(model: Any, arch: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    block = model.get_submodule(arch.table.blocks)[layer]
    hook = block.register_forward_hook(
        lambda _m, _a, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return caught[0]


def inputs_of(model: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    module = model.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return caught[0].reshape(ids.numel(), -1)


def loss_of(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


CASES = [(name, (Unit(2), Unit(3), Unit(5))) for name in ADDED] + [
    ("llama", (Unit(2, "mlp"), Unit(4, "mlp"))),
    ("phi", (Unit(2, "attention"), Unit(3, "attention"))),
    ("opt", (Unit(1, "mlp"),)),
]


@pytest.mark.parametrize(("model_type", "units"), CASES)
def test_each_seam_is_mended_as_the_rows_say(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    units: tuple[Unit, ...],
) -> None:
    made = twin(model_type)
    arch, cut = made.arch, cut_of(made, units)
    seams = seams_of(arch, units, lambda *_: False)
    found = repair(made.checkpoint, seams, cut, CalibrationContext(tokens, machine))
    edited = without(made.model, arch, cut)
    out = held_out(24)
    fitted = [row for row in range(24) if row not in out]
    ids = tokens.ids[fitted + out]
    before = loss_of(edited, ids[21:])
    times = added_times(arch)
    assert (found.tokens, found.held_out_tokens) == (252, 36)
    for seam, log in zip(seams, found.logs, strict=True):
        assert seam.group is not None
        (tensor,) = seam.group.tensors
        path = name_in_memory(arch, tensor.name).removesuffix(".weight")
        module = edited.get_submodule(path)
        goal = states_after(made.model, arch, seam.goal.layer, ids)
        lacks = (goal - states_after(edited, arch, seam.group.layer, ids)) / times
        weights = 1 / goal.square().mean(-1).flatten()
        rows = inputs_of(edited, path, ids)
        bias = getattr(module, "bias", None) is not None
        moments = Moments(rows.shape[1], goal.shape[-1], "cpu", bias=bias, held_tokens=36)
        flat = lacks.flatten(0, 1)
        moments.see(rows[:252], flat[:252], weights[:252])
        moments.hold(rows[252:], flat[252:], weights[252:])
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.data.T if transposed else module.weight.data
        expected = mended(weight, moments)
        assert log["projection"] == tensor.name
        assert log["ridge"] == expected.ridge
        assert log["state_error"] == pytest.approx([expected.before, expected.after], rel=1e-2)
        assert log["state_error"][1] <= log["state_error"][0]
        if expected.change is not None:
            change = found.read(tensor.name)
            change = change.T if transposed else change
            torch.testing.assert_close(change, weight + expected.change, atol=2e-2, rtol=2e-2)
            module.weight.data.copy_(found.read(tensor.name))
            if bias:
                module.bias.data.copy_(found.read(tensor.name.replace(".weight", ".bias")))
    assert any(log["ridge"] is not None for log in found.logs)
    assert found.loss == pytest.approx((before, loss_of(edited, ids[21:])), rel=1e-3)


@pytest.mark.parametrize("spooled", [False, True])
@pytest.mark.parametrize(
    "units", [(Unit(1), Unit(3), Unit(4)), (Unit(1, "attention"), Unit(3, "attention"))]
)
def test_a_killed_pass_goes_on_to_the_same_bytes(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    units: tuple[Unit, ...],
    spooled: bool,
) -> None:
    made = twin("llama")
    machine = replace(machine, ram_bytes=0) if spooled else machine
    asked = made.checkpoint, seams_of(made.arch, units, lambda *_: False), cut_of(made, units)
    whole = repair(*asked, CalibrationContext(tokens, replace(machine, ram_bytes=8 << 30)))
    monkeypatch.setattr(checkpointing, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(checkpointing, "_SHARE", 0)
    take, taken = seam_refit._Pass._take, list[int]()

    def killed(self: Any, number: int, *rest: Any) -> None:
        """After each step, and at its end, before what it did is saved."""
        again = number in taken
        taken.append(number)
        take(self, number, *rest)
        if not again:
            raise KeyboardInterrupt

    monkeypatch.setattr(seam_refit._Pass, "_take", killed)
    kills, found = 0, None
    while found is None:
        try:
            found = repair(
                *asked, CalibrationContext(tokens, machine, scratch=tmp_path / "scratch")
            )
        except KeyboardInterrupt:
            kills += 1
    assert kills == len(taken) / 2 > 5, "it goes on from the step that was killed"
    assert found.logs == whole.logs
    assert found.loss == whole.loss
    assert found.names.keys() == whole.names.keys()
    for name in whole.names:
        assert torch.equal(found.read(name), whole.read(name))


def test_one_window_is_fitted_and_none_held_out(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made, units = twin("llama"), (Unit(2),)
    seams = seams_of(made.arch, units, lambda *_: False)
    one = TokenSet.of(tokens.ids[:1])
    found = repair(made.checkpoint, seams, cut_of(made, units), CalibrationContext(one, machine))
    assert (found.loss, found.held_out_tokens) == (None, 0)
    assert found.logs[0]["ridge"] == 0.1
    assert found.logs[0]["state_error"] == [None, None]


def test_a_refit_beyond_the_dtype_leaves_weight_and_bias_as_they_were(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, units = twin("gpt2"), (Unit(2),)

    def too_large(weight: torch.Tensor, moments: Moments) -> Mended:
        assert moments.bias
        much = torch.full_like(weight, torch.inf)
        return Mended(much, much[:, 0], 1.0, 2.0, 1.0)

    monkeypatch.setattr(seam_refit, "mended", too_large)
    seams = seams_of(made.arch, units, lambda *_: False)
    context = CalibrationContext(tokens, machine)
    found = repair(made.checkpoint, seams, cut_of(made, units), context)
    assert not found.names
    assert found.loss is not None
    assert found.loss[0] == found.loss[1]


def test_seams_with_nothing_before_them_are_refused(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made, units = twin("llama"), (Unit(0),)
    seams = seams_of(made.arch, units, lambda *_: False)
    with pytest.raises(ValueError, match="no seam has a projection before it"):
        repair(made.checkpoint, seams, cut_of(made, units), CalibrationContext(tokens, machine))


def test_which_windows_are_held_out() -> None:
    assert held_out(1) == []
    assert held_out(2) == [1]
    assert held_out(7) == [6]
    assert held_out(24) == [7, 15, 23]


def test_a_family_that_norms_outputs_is_refused(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("olmo2")
    seams = seams_of(made.arch, (Unit(2),), lambda *_: False)
    with pytest.raises(ValueError, match="not simply added"):
        repair(
            made.checkpoint,
            seams,
            CutModel(frozenset({2}), {}),
            CalibrationContext(tokens, machine),
        )
