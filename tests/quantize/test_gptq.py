"""`quantize: gptq` on a model: what it refuses, that grids come along, and kills change nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import NAME, Grids, write_grids
from prune_export.errors import CheckpointError, PlanError
from prune_export.grids import Grid
from prune_export.quantize.gptq import Gptq
from prune_export.quantize.rtn import Rtn
from prune_export.sparsity.nm import Nm
from prune_export.surgery import rewrite
from tests.contracts.made import plain_view


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(method: Gptq | Rtn, name: str = "out") -> Checkpoint:
        source = Checkpoint.open(tiny_llama)
        found = method.decide(plain_view(source, tmp_path / "scratch"))
        after = rewrite(source, source.arch(), found.edits, tmp_path / name, ram_bytes=1 << 30)
        write_grids(after.path, found.grids)
        return after

    return make


def test_zeros_and_codes_in_one_sweep(made: Callable[..., Checkpoint]) -> None:
    after = made(Gptq(nm=Nm(2, 4), group_size=16, include=("down",)))
    grids = Grids.of(after)
    assert grids is not None
    for name in grids:
        assert name.endswith("down_proj.weight")
        weight = after.read(name)
        assert bool(((weight.view(len(weight), -1, 4) == 0).sum(-1) >= 2).all())
        assert grids.read(name).error(weight) == 0


def test_a_pass_that_was_finished_gives_the_same_grids(made: Callable[..., Checkpoint]) -> None:
    first, second = (made(Gptq(symmetric=True), name) for name in ("one", "two"))
    for file in (NAME, "model.safetensors"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_found_again_in_half_precision(
    bits: int, dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    half = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=getattr(torch, dtype))
    half.save_pretrained(tmp_path / "half")
    source = Checkpoint.open(tmp_path / "half")
    method = Rtn(bits=bits)  # type: ignore[arg-type]
    found = method.decide(plain_view(source, tmp_path))
    after = rewrite(source, source.arch(), found.edits, tmp_path / "out", ram_bytes=1 << 30)
    write_grids(after.path, found.grids)
    grids = Grids.of(after)
    assert grids is not None
    for name in grids:
        grid = grids.read(name)
        expected = grid.codes(source.read(name))
        assert torch.equal(grids.codes(name, after.read(name), grid), expected)


def test_weights_that_were_changed_since_are_refused(made: Callable[..., Checkpoint]) -> None:
    after = made(Rtn())
    grids = Grids.of(after)
    assert grids is not None
    name = next(iter(grids))
    grid = grids.read(name)
    moved = after.read(name) + 0.3 * grid.scales.abs().max()
    with pytest.raises(CheckpointError, match="it was changed since"):
        grids.codes(name, moved, grid)
    with pytest.raises(CheckpointError, match="expected \\["):
        grids.codes(name, after.read(name)[:, :16], grid)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda grid: Grid(3, 32, grid.scales), "got 3 bits in groups of 32"),
        (lambda grid: Grid(4, 24, grid.scales), "got 4 bits in groups of 24"),
        (lambda grid: Grid(4, 32, grid.scales * torch.inf), "not finite"),
        (lambda grid: Grid(4, 32, grid.scales, grid.scales.to(torch.uint8) + 16), "no codes"),
        (lambda grid: Grid(4, 32, grid.scales, grid.scales.to(torch.uint8)[:1]), "expected U8"),
    ],
)
def test_a_broken_file_of_grids_is_refused(
    spoil: Callable[[Grid], Grid], message: str, made: Callable[..., Checkpoint]
) -> None:
    after = made(Rtn(include=("q",)))
    grids = Grids.of(after)
    assert grids is not None
    name = next(iter(grids))
    broken = spoil(grids.read(name))
    write_grids(after.path, {name: lambda: broken})
    again = Grids.of(after)
    assert again is not None
    with pytest.raises(CheckpointError, match=message):
        again.read(name)
    write_grids(after.path, {"model.norm.weight": lambda: broken})
    with pytest.raises(CheckpointError, match="is no matrix of this model"):
        Grids.of(after)


def test_what_cannot_work_is_refused(tiny_llama: Path) -> None:
    arch = Checkpoint.open(tiny_llama).arch()
    with pytest.raises(PlanError, match="got both"):
        Gptq(nm=Nm(2, 4), sparsity=0.5)
    with pytest.raises(PlanError, match="cannot be cut into"):
        Gptq(nm=Nm(4, 6))
    with pytest.raises(PlanError, match="is not a role"):
        Gptq(include=("queries",))
    with pytest.raises(PlanError, match="the model has"):
        Gptq(layers=(99,)).predict(arch)
    assert Gptq(symmetric=True, group_size=128).bits_a_weight() == 4.125
    assert "in 4.62 bits each" in Gptq().note(arch)
