"""Losses without blocks or parts of them, against whole transformers models; and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prune_export.arch.table import tables
from prune_export.calibrate import Ablations, CalibrationContext, TokenSet, Unit
from prune_export.calibrate.passes import ablation
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.machine import Machine
from tests.arch.tiny_models import name_in_memory

OUTPUTS = {
    "attention": ("o", "o.bias", "linear.out", "linear.out.bias"),
    "mlp": (
        "down", "down.bias", "expert.down", "experts.down", "experts.down.bias", "shared.down",
        "shared.down.bias",
    ),
}  # fmt: skip


def by_hand(made: Any, ids: torch.Tensor, units: Iterable[Unit]) -> float:
    """The loss of the whole model with blocks skipped and output matrices set to zero."""
    blocks = made.model.get_submodule(made.arch.table.blocks)
    parameters = dict(made.model.named_parameters())
    saved: dict[str, torch.Tensor] = {}
    for unit in units:
        for tensor in made.arch.block(unit.layer) if unit.part != "block" else ():
            if tensor.role not in OUTPUTS[unit.part]:
                continue
            name = name_in_memory(made.arch, tensor.name)
            if tensor.role in ("expert.down", "experts.down") and name not in parameters:
                prefix = f"{made.arch.table.blocks}.{unit.layer}."
                inside = next(
                    name
                    for name, _ in blocks[unit.layer].named_parameters()
                    if name.endswith("experts.down_proj")
                )
                name = prefix + inside
            saved.setdefault(name, parameters[name].detach().clone())
            parameters[name].data.zero_()
    found = made.loss(ids, [unit.layer for unit in units if unit.part == "block"])
    for name, value in saved.items():
        parameters[name].data.copy_(value)
    return found


QUESTIONS: list[list[Unit]] = [
    [],
    [Unit(0)],
    [Unit(2), Unit(5)],
    [Unit(1, "attention")],
    [Unit(3, "mlp")],
    [Unit(1), Unit(3, "attention"), Unit(3, "mlp"), Unit(4, "mlp")],
]


@pytest.mark.families("roles")
@pytest.mark.parametrize("model_type", sorted(tables()))
def test_losses_equal_those_of_whole_models(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, model_type: str
) -> None:
    made = twin(model_type)
    with Ablations(made.checkpoint, CalibrationContext(tokens, machine)) as measured:
        found = measured.losses(QUESTIONS)
    expected = [by_hand(made, tokens.ids, units) for units in QUESTIONS]
    assert found == pytest.approx(expected, rel=2e-5)


def test_a_norm_after_the_residual_sum_stays(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    """OPT-350m normalises after its attention: what is removed is what is added, not the norm."""
    made = twin("opt", do_layer_norm_before=False)
    with Ablations(made.checkpoint, CalibrationContext(tokens, machine)) as measured:
        found = measured.losses(QUESTIONS)
    assert found == pytest.approx(
        [by_hand(made, tokens.ids, units) for units in QUESTIONS], rel=2e-5
    )


def test_states_are_computed_once_for_all_models_that_share_them(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine
) -> None:
    made = twin("llama")  # 6 blocks; 5 windows make 3 chunks
    with Ablations(made.checkpoint, CalibrationContext(tokens, machine)) as measured:
        assert measured.chunks == 3
        measured.losses([()], keep=[()])
        assert (measured.block_forwards, measured.head_forwards) == (3 * 6, 3)
        # Without block i, only the blocks after it; the dense model's states were kept.
        measured.losses([[Unit(i)] for i in range(6)], keep=[[Unit(4)]])
        assert measured.block_forwards == 3 * (6 + 5 + 4 + 3 + 2 + 1)
        # What comes before block 4 is known, and so is what comes after it without it.
        measured.losses([[Unit(4), Unit(5)], [Unit(3), Unit(4)]], keep=[[Unit(4)]])
        assert measured.block_forwards == 3 * (21 + 0 + 1)
        heads = measured.head_forwards
        measured.losses([[Unit(5), Unit(4)], [Unit(2)], ()])
        assert (measured.block_forwards, measured.head_forwards) == (3 * 22, heads)
        # Nothing was to be kept, so this starts at block 0 again, but for the first chunk alone.
        measured.losses([[Unit(4), Unit(2)]], chunks=1)
        assert measured.block_forwards == 3 * 22 + 4


def test_one_block_in_memory_and_states_in_files_give_the_same(
    twin: Callable[..., Any], tokens: TokenSet, machine: Machine, tmp_path: Path
) -> None:
    made = twin("qwen2")
    with Ablations(made.checkpoint, CalibrationContext(tokens, machine)) as measured:
        expected = [measured.losses([model], keep=[()])[0] for model in QUESTIONS]
    small = replace(machine, ram_bytes=0)
    with Ablations(
        made.checkpoint, CalibrationContext(tokens, small, scratch=tmp_path)
    ) as measured:
        found = [measured.losses([model], keep=[()])[0] for model in QUESTIONS]
        files = list(tmp_path.rglob("*.spool"))
        assert len(files) == 3 * 7, "the states on the dense model's way"
    assert found == expected
    assert not list(tmp_path.rglob("*.spool"))


def test_a_killed_search_asks_again_and_goes_on(
    twin: Callable[..., Any],
    tokens: TokenSet,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = twin("gpt2")
    with Ablations(made.checkpoint, CalibrationContext(tokens, machine)) as measured:
        expected = measured.losses(QUESTIONS)
    with Ablations(
        made.checkpoint, CalibrationContext(tokens, machine, scratch=tmp_path)
    ) as measured:
        measured.losses(QUESTIONS[:3])

        def killed(*_: Any) -> float:
            raise KeyboardInterrupt

        monkeypatch.setattr(LayerwiseModel, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            measured.losses(QUESTIONS[3:])
    monkeypatch.undo()
    with Ablations(
        made.checkpoint, CalibrationContext(tokens, machine, scratch=tmp_path)
    ) as measured:
        assert measured.losses(QUESTIONS[:3]) == expected[:3]
        assert measured.block_forwards == 0
        assert measured.losses(QUESTIONS) == expected
        assert measured.head_forwards == 3 * 3


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_only_where_a_gpu_multiplies_it(
    native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says yes of older GPUs as well, which it lets emulate it."""
    from prune_export.training.model import compute_dtype

    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    gpu = Machine("cuda", 8 << 30, 8 << 30, 1, 80 if native else 75)
    assert ablation.native_dtype(gpu) == compute_dtype("auto", gpu) == dtype
