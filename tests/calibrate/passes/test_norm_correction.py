"""Norms corrected by what a block would give unedited, against sweeps that see just that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from prune_export.calibrate import (
    CalibrationContext,
    CorrectedNorms,
    Edited,
    InputNorms,
    LinearGroup,
    Order,
    TokenSet,
    run_sequential,
)
from prune_export.calibrate.passes import norm_correction, sequential, sequential_state
from prune_export.machine import Machine
from tests.calibrate.passes.test_sequential import DENSE

pytestmark = pytest.mark.usefixtures("small_sweeps")


@dataclass
class Shrinks:
    """Makes the first outputs of every matrix small, and keeps the norms that it saw."""

    kind: type[InputNorms]
    sums: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    key: str = "shrinks"

    def watch(self, group: LinearGroup, width: int, device: str) -> InputNorms:
        return self.kind(width, device)

    def edit(
        self, group: LinearGroup, weights: Mapping[str, torch.Tensor], seen: InputNorms
    ) -> Edited:
        self.sums[group.layer, group.kind] = seen.sums.clone()
        made = {name: weight.clone() for name, weight in weights.items()}
        for weight in made.values():
            weight[: len(weight) // 2] *= 0.3
        return Edited(made, {})


def first_block(
    made: Any, tokens: TokenSet, machine: Machine, kind: type[InputNorms], order: Order
) -> dict[str, torch.Tensor]:
    editor = Shrinks(kind)
    run_sequential(made.checkpoint, editor, CalibrationContext(tokens, machine), order=order)
    return {kind: sums for (layer, kind), sums in editor.sums.items() if layer == 0}


@pytest.mark.families("each", "mode")
@pytest.mark.parametrize("mode", ["parked", "repeated"], indirect=True)
@pytest.mark.parametrize("model_type", DENSE)
def test_whole_windows_give_the_norms_of_the_unedited_block(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    model_type: str,
    mode: str,
) -> None:
    assert tokens.ids.shape[1] < norm_correction.PREFIX_TOKENS
    made = twin(model_type)
    unedited = first_block(made, tokens, machine, InputNorms, "block")
    edited = first_block(made, tokens, machine, InputNorms, "sequential")
    found = first_block(made, tokens, machine, CorrectedNorms, "sequential")
    differs = 0
    for kind, sums in found.items():
        expected = (unedited[kind] + 0.1 * edited[kind]) / 1.1
        torch.testing.assert_close(sums, expected, rtol=2e-3, atol=1e-5)
        differs += not torch.allclose(edited[kind], unedited[kind], rtol=0.05)
    # Where experts are one tensor on disk, only attention is edited. Gemma 4 norms queries, keys,
    # values, and what attention gives: smaller weights change only what leaves its MLP.
    least = 1 if model_type == "gemma4_text" else min(2, len(found) - 1)
    assert differs >= least, "edits must matter here"


def test_heads_stand_for_their_windows(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = twin("llama")
    unedited = first_block(made, tokens, machine, InputNorms, "block")["attention.out"]
    edited = first_block(made, tokens, machine, InputNorms, "sequential")["attention.out"]
    for module in (norm_correction, sequential, sequential_state):
        monkeypatch.setattr(module, "PREFIX_TOKENS", 5)
    found = first_block(made, tokens, machine, CorrectedNorms, "sequential")["attention.out"]
    off, before = (found / unedited).log().abs(), (edited / unedited).log().abs()
    assert 0 < off.mean() < 0.5 * before.mean()


def test_a_channel_that_the_heads_do_not_reach_stays_about_as_it_is() -> None:
    seen = CorrectedNorms(3, "cpu")
    seen.see_unedited(torch.tensor([[[0.0, 2.0, 0.0]]]).expand(1, norm_correction.PREFIX_TOKENS, 3))
    window = torch.zeros(1, 4 * norm_correction.PREFIX_TOKENS, 3)
    window[:, :, 1] = 1.0
    window[:, norm_correction.PREFIX_TOKENS :, 0] = 3.0  # only after the head
    seen.see(window)
    plain = window.square().sum((0, 1))
    assert seen.sums[0] == plain[0]
    assert seen.sums[1] == pytest.approx(float(plain[1]) * 4.1 / 1.1)
    assert seen.sums[2] == 0


def test_states_in_files_give_the_same(
    twin: Callable[..., Any], tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = twin("llama")
    for module in (norm_correction, sequential, sequential_state):
        monkeypatch.setattr(module, "PREFIX_TOKENS", 5)
    roomy = first_block(made, tokens, Machine("cpu", 8 << 30, 0, 1), CorrectedNorms, "sequential")
    tight = first_block(made, tokens, Machine("cpu", 1, 0, 1), CorrectedNorms, "sequential")
    for kind, sums in roomy.items():
        torch.testing.assert_close(tight[kind], sums)


def test_in_block_order_nothing_is_corrected(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("llama")
    plain = first_block(made, tokens, machine, InputNorms, "block")
    found = first_block(made, tokens, machine, CorrectedNorms, "block")
    for kind, sums in found.items():
        assert torch.equal(sums, plain[kind])
