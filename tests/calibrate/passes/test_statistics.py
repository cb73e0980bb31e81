"""The streamed pass against brute force on whole transformers models, for every family."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from prune_export.arch.table import tables
from prune_export.calibrate import (
    AngularDistance,
    BlockInfluence,
    CalibrationContext,
    SkipLoss,
    TokenSet,
    gather,
    pass_cost,
)
from prune_export.calibrate.streaming import checkpointing
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint import Checkpoint
from prune_export.errors import PlanError
from prune_export.machine import Machine
from tests.killed import Killed

VARIANTS = [
    pytest.param(model_type, changes, id=f"{model_type}-{name}")
    for model_type, table in sorted(tables().items())
    for name, changes in {"plain": {}, **table.tiny.variants}.items()
]
BYPASSED = (0, 2, 5)
ALL = (AngularDistance(), BlockInfluence(), SkipLoss(BYPASSED), SkipLoss((1, 2), 3, 7))


pytestmark = pytest.mark.usefixtures("small_sweeps")


@pytest.mark.families("each", "tied")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_every_statistic_equals_brute_force(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    changes: Mapping[str, Any],
    tied: bool,
) -> None:
    made = twin(model_type, **changes, tie_word_embeddings=tied)
    found = gather(made.checkpoint, ALL, CalibrationContext(tokens, machine))
    points = made.points(tokens.ids).double()

    last = points[:, :, -1]
    cosine = torch.nn.functional.cosine_similarity(last[:, None], last[None], dim=-1)
    distances = cosine.clamp(-1, 1).arccos().mean(-1) / pi
    torch.testing.assert_close(found[ALL[0]], distances.fill_diagonal_(0), atol=1e-5, rtol=0)

    influence = 1 - torch.nn.functional.cosine_similarity(points[:-1], points[1:], dim=-1)
    torch.testing.assert_close(found[ALL[1]], influence.mean((1, 2)), atol=1e-6, rtol=1e-5)

    losses = found[ALL[2]]
    assert losses.dense == pytest.approx(made.loss(tokens.ids), rel=1e-6, abs=1e-5)
    expected = {layer: made.loss(tokens.ids, [layer]) for layer in BYPASSED}
    assert losses.skipped == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert max(expected.values()) - min(expected.values()) > 1e-2

    fewer = found[ALL[3]]
    assert fewer.dense == pytest.approx(made.loss(tokens.ids[:3, :7]), rel=1e-6, abs=1e-5)
    assert fewer.skipped[2] == pytest.approx(made.loss(tokens.ids[:3, :7], [2]), rel=1e-6, abs=1e-5)


def test_the_last_point_is_not_normed(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("llama")
    with torch.no_grad():
        states = made.model(tokens.ids, output_hidden_states=True, use_cache=False).hidden_states
    found = gather(made.checkpoint, [AngularDistance()], CalibrationContext(tokens, machine))[
        AngularDistance()
    ]
    normed = torch.nn.functional.cosine_similarity(states[-2][:, -1], states[-1][:, -1])
    trapped = (normed.double().arccos() / pi).mean()
    assert abs(found[-2, -1] - trapped) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_a_spooled_pass_gives_the_same_bits(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    model_type: str,
) -> None:
    made = twin(model_type)
    in_memory = gather(made.checkpoint, ALL, CalibrationContext(tokens, machine))
    starved = dataclasses.replace(machine, ram_bytes=1)
    spooled = gather(
        made.checkpoint, ALL, CalibrationContext(tokens, starved, scratch=tmp_path / "scratch")
    )
    assert list((tmp_path / "scratch").rglob("*.spool"))
    assert_same_bits(spooled, in_memory)


@pytest.mark.parametrize("ram_bytes", [1, 8 * 1024**3], ids=["spooled", "in memory"])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 5])
def test_a_killed_pass_goes_on_and_ends_in_the_same_bits(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ram_bytes: int,
    at: int,
) -> None:
    made = twin("gemma2")
    unbroken = gather(made.checkpoint, ALL, CalibrationContext(tokens, machine))
    machine = dataclasses.replace(machine, ram_bytes=ram_bytes)
    monkeypatch.setattr(checkpointing.Saves, "due", lambda _self: True)
    scratch, runs, blocks = tmp_path / "scratch", 0, []
    real = LayerwiseModel.run

    def fragile(self: LayerwiseModel, layer: int, *args: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs == 10 * at + 1:
            raise Killed
        blocks.append(layer)
        return real(self, layer, *args)

    monkeypatch.setattr(LayerwiseModel, "run", fragile)
    with pytest.raises(Killed):
        gather(made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=scratch))
    reached = max(blocks, default=0)
    blocks.clear()
    assert_same_bits(
        gather(made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=scratch)), unbroken
    )
    assert min(blocks) in (reached, reached + 1)


@pytest.mark.parametrize("ram_bytes", [1, 8 * 1024**3], ids=["spooled", "in memory"])
def test_a_pass_that_ended_is_not_run_again(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ram_bytes: int,
) -> None:
    made = twin("llama")
    machine = dataclasses.replace(machine, ram_bytes=ram_bytes)
    monkeypatch.setattr(checkpointing.Saves, "due", lambda _self: True)
    first = gather(
        made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=tmp_path / "scratch")
    )
    assert not list((tmp_path / "scratch").rglob("*-states*"))

    def refuse(*_: Any) -> torch.Tensor:
        raise Killed

    monkeypatch.setattr(LayerwiseModel, "run", refuse)
    again = gather(
        made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=tmp_path / "scratch")
    )
    assert_same_bits(again, first)


@pytest.mark.parametrize("before", [1, 8 * 1024**3], ids=["less to more", "more to less"])
def test_a_killed_pass_may_go_on_with_other_memory(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: int,
) -> None:
    made = twin("llama")
    unbroken = gather(made.checkpoint, ALL, CalibrationContext(tokens, machine))
    monkeypatch.setattr(checkpointing.Saves, "due", lambda _self: True)
    real = LayerwiseModel.run

    def fragile(self: LayerwiseModel, layer: int, *args: Any) -> torch.Tensor:
        if layer == 3:
            raise Killed
        return real(self, layer, *args)

    monkeypatch.setattr(LayerwiseModel, "run", fragile)
    with pytest.raises(Killed):
        first = dataclasses.replace(machine, ram_bytes=before)
        gather(
            made.checkpoint, ALL, CalibrationContext(tokens, first, scratch=tmp_path / "scratch")
        )
    monkeypatch.setattr(LayerwiseModel, "run", real)
    other = dataclasses.replace(machine, ram_bytes=8 * 1024**3 + 1 - before)
    found = gather(
        made.checkpoint, ALL, CalibrationContext(tokens, other, scratch=tmp_path / "scratch")
    )
    assert_same_bits(found, unbroken)


def test_a_save_of_another_boot_is_not_trusted(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = twin("llama")
    monkeypatch.setattr(checkpointing.Saves, "due", lambda _self: True)
    first = gather(made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=tmp_path))
    monkeypatch.setattr(checkpointing, "_boot", lambda: "another")
    for saved in tmp_path.rglob("*.saved"):
        saved.write_bytes(b"")
    assert_same_bits(
        gather(made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=tmp_path)), first
    )


def test_a_save_of_other_tokens_is_not_used(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = twin("llama")
    monkeypatch.setattr(checkpointing.Saves, "due", lambda _self: True)
    gather(made.checkpoint, ALL, CalibrationContext(tokens, machine, scratch=tmp_path))
    other = TokenSet.of(tokens.ids.flip(1))
    found = gather(made.checkpoint, ALL, CalibrationContext(other, machine, scratch=tmp_path))
    assert_same_bits(found, gather(made.checkpoint, ALL, CalibrationContext(other, machine)))


def test_bfloat16_weights_are_computed_in_float32(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, tmp_path: Path
) -> None:
    made = twin("llama")
    made.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    # Read back: casting a model in memory would round its rotary frequencies as well.
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    half = dataclasses.replace(made, model=read.eval())
    checkpoint = Checkpoint.open(tmp_path / "half")
    losses = gather(checkpoint, ALL[2:3], CalibrationContext(tokens, machine))[ALL[2]]
    assert losses.dense == pytest.approx(half.loss(tokens.ids), abs=1e-6)


def test_one_block_at_a_time_holds_weights(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = twin("mixtral")
    held, real = [], LayerwiseModel.run

    def watched(self: LayerwiseModel, layer: int, *args: Any) -> torch.Tensor:
        loaded = [not next(block.parameters()).is_meta for block in self._blocks]
        held.append(sum(loaded))
        return real(self, layer, *args)

    monkeypatch.setattr(LayerwiseModel, "run", watched)
    gather(made.checkpoint, ALL, CalibrationContext(tokens, machine))
    assert set(held) == {1}


def test_a_pass_over_nothing_reads_nothing(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    assert gather(twin("llama").checkpoint, [], CalibrationContext(tokens, machine)) == {}


def test_windows_longer_than_the_positions_are_refused(
    twin: Callable[..., Any], machine: Machine
) -> None:
    tokens = TokenSet.of(torch.ones(1, 65, dtype=torch.int64))
    with pytest.raises(PlanError, match="65, but the model has 64 positions"):
        gather(twin("llama").checkpoint, ALL, CalibrationContext(tokens, machine))


def test_ids_of_another_tokenizer_are_refused(twin: Callable[..., Any], machine: Machine) -> None:
    tokens = TokenSet.of(torch.full((1, 4), 64))
    with pytest.raises(PlanError, match="token id 64, but the model knows 64"):
        gather(twin("llama").checkpoint, ALL, CalibrationContext(tokens, machine))


def test_the_cost_counts_states_and_forward_passes(
    twin: Callable[..., Any], machine: Machine
) -> None:
    arch = twin("llama").arch
    one = pass_cost(arch, [AngularDistance()], 100, 32, machine)
    twice = pass_cost(arch, [AngularDistance()], 200, 32, machine)
    assert twice.flops == 2 * one.flops
    states = 100 * 32 * arch.sizes["residual"] * 4
    assert states <= twice.ram_bytes - one.ram_bytes <= 2 * states
    variants = pass_cost(arch, [SkipLoss((0, 5))], 100, 32, machine)
    assert variants.flops > one.flops * (1 + (5 + 0) / 6)
    poor = dataclasses.replace(machine, ram_bytes=states)
    assert pass_cost(arch, [AngularDistance()], 100, 32, poor).disk_bytes == 2 * states


def assert_same_bits(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> None:
    for statistic in ALL[:2]:
        assert torch.equal(found[statistic], expected[statistic])
    for statistic in ALL[2:]:
        assert found[statistic] == expected[statistic]
