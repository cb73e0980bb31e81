from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from prune_export.checkpoint import Checkpoint, Planned, write_checkpoint
from prune_export.errors import CheckpointError, PlanError
from prune_export.surgery import (
    Drop,
    Edit,
    Keep,
    Overwrite,
    Untie,
)
from prune_export.surgery.rewriting import _Cut
from tests.saved_models import contents, maker
from tests.surgery.surgery_calls import DOWN, Saved, cut, loaded, logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return maker(tmp_path_factory.mktemp)


# --- Drop --------------------------------------------------------------------------------------

FAMILIES = {
    "llama": "model.layers",
    "gpt2": "transformer.h",
    "gemma2": "model.layers",
    "phi3": "model.layers",
    "opt": "model.decoder.layers",
    "mixtral": "model.layers",
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_depth_cut_is_the_model_with_those_blocks_skipped(
    saved: Saved, tmp_path: Path, model_type: str, shard: str
) -> None:
    cut(saved(model_type, shard=shard), [Drop((1, 2)), Drop((4,))], tmp_path / "out")
    dense = loaded(saved(model_type, shard=shard))
    blocks = dense.get_submodule(FAMILIES[model_type])
    kept = [blocks[i] for i in (0, 3, 5)]
    for new, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new
    parent, _, name = FAMILIES[model_type].rpartition(".")
    setattr(dense.get_submodule(parent), name, torch.nn.ModuleList(kept))
    listed = getattr(dense.config, "layer_types", None)
    if listed:
        dense.config.layer_types = [listed[i] for i in (0, 3, 5)]
    dense.config.num_hidden_layers = 3
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(dense))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_kept_is_kept_to_the_bit(saved: Saved, tmp_path: Path, dtype: str) -> None:
    path = saved("llama", dtype=dtype)
    result = cut(path, [Drop((0, 3))], tmp_path / "out")
    before, after = load_file(path / "model.safetensors"), {}
    for file in result.files:
        after |= load_file(file)
    assert result.dtype == dtype
    for new, old in {0: 1, 1: 2, 2: 4, 3: 5}.items():
        names = [name for name in before if name.startswith(f"model.layers.{old}.")]
        for name in names:
            there = after.pop(name.replace(f"layers.{old}.", f"layers.{new}."))
            assert torch.equal(there.view(torch.uint8), before[name].view(torch.uint8))
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_no_edit_is_a_copy(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama")
    cut(path, [], tmp_path / "out")
    before, after = (load_file(place / "model.safetensors") for place in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_edits_give_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    edits: list[Edit] = [Drop((1,)), *(Keep(f"mlp.{i}", tuple(range(24))) for i in (0, 2, 3, 4, 5))]
    for name in ("a", "b"):
        cut(saved("llama"), iter(edits), tmp_path / name, max_shard_bytes=20_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) > 4


# --- Keep --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_an_mlp_cut_is_the_model_with_those_channels_silent(
    saved: Saved, tmp_path: Path, model_type: str
) -> None:
    """Fused gate and up (phi3) and transposed Conv1D (gpt2) as well as plain projections."""
    changes = {"n_inner": 48} if model_type == "gpt2" else {}
    path = saved(model_type, **changes)
    arch = Checkpoint.open(path).arch()
    index = tuple(i for i in range(arch.sizes["mlp.0"]) if i % 3)
    result = cut(path, [Keep(f"mlp.{i}", index) for i in range(6)], tmp_path / "out")
    assert result.arch().sizes["mlp.3"] == len(index)
    dense = loaded(path)
    silent = [i for i in range(arch.sizes["mlp.0"]) if i not in index]
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter[:, silent] = 0
            if name.endswith("mlp.c_proj.weight"):
                parameter[silent] = 0
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(dense))


@pytest.mark.parametrize(
    ("axis", "kept"), [("kv", (1,)), ("group", (0,)), ("group", (1,)), ("kv", (0, 1))]
)
def test_a_head_cut_is_the_model_with_those_heads_silent(
    saved: Saved, tmp_path: Path, axis: str, kept: tuple[int, ...]
) -> None:
    """Grouped queries: 2 key heads of 2 queries each, `(kv group dim)` in one dimension."""
    path = saved("llama", head_dim=8)
    result = cut(path, [Keep(f"{axis}.{i}", kept) for i in range(6)], tmp_path / "out")
    assert result.arch().sizes[f"{axis}.0"] == len(kept)
    dense = loaded(path)
    heard = torch.zeros(2, 2, 8)
    heard[
        list(kept) if axis == "kv" else slice(None), slice(None) if axis == "kv" else list(kept)
    ] = 1
    with torch.no_grad():
        for block in dense.model.layers:
            block.self_attn.o_proj.weight *= heard.reshape(-1)
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), logits(dense))


def test_two_axes_of_one_dimension_are_cut_together(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama", head_dim=8, num_attention_heads=8, num_key_value_heads=2)
    edits = [edit for i in range(6) for edit in (Keep(f"kv.{i}", (1,)), Keep(f"group.{i}", (0, 2)))]
    result = cut(path, edits, tmp_path / "out")
    name = "model.layers.4.self_attn.q_proj.weight"
    whole = Checkpoint.open(path).read(name).reshape(2, 4, 8, 32)
    assert torch.equal(result.read(name), whole[[1]][:, [0, 2]].reshape(16, 32))
    logits(loaded(tmp_path / "out"))


def test_cuts_and_drops_together_speak_of_the_old_layers(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama")
    indices = {i: tuple(range(i, 48, 2))[:20] for i in (0, 2, 4, 5)}
    edits = [*(Keep(f"mlp.{i}", index) for i, index in indices.items()), Drop((1, 3))]
    result = cut(path, edits, tmp_path / "out")
    before = load_file(path / "model.safetensors")
    for new, (old, index) in enumerate(indices.items()):
        there = result.read(f"model.layers.{new}.mlp.down_proj.weight")
        assert torch.equal(there, before[f"model.layers.{old}.mlp.down_proj.weight"][:, index])
    logits(loaded(tmp_path / "out"))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), window=st.integers(1, 2000))
def test_any_window_gives_the_same_rows(
    data: st.DataObject, window: int, tmp_path_factory: Any
) -> None:
    place = tmp_path_factory.mktemp("window")
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    dtype = data.draw(st.sampled_from(["F32", "BF16", "F8_E4M3", "F64"]))
    cuts = tuple(
        (dim, sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
        for dim, size in enumerate(shape)
        if data.draw(st.booleans())
    )
    kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}
    kind["F8_E4M3"] = torch.float8_e4m3fn
    whole = torch.randn(shape).to(kind[dtype])
    plan = [Planned("a", dtype, shape, lambda: whole)]
    source = write_checkpoint(place, {"model_type": "llama"}, plan, fsync=False)
    pieces = list(_Cut(source, "a", cuts, window)())
    wanted = whole.to(torch.float64)
    for dim, positions in cuts:
        wanted = wanted.index_select(dim, torch.tensor(positions))
    assert torch.equal(torch.cat([piece.to(torch.float64) for piece in pieces]), wanted)
    assert all(piece.dtype == whole.dtype for piece in pieces)
    row = max(1, whole.nbytes // shape[0])
    assert all(piece.shape[0] <= max(1, window // row) for piece in pieces)


def test_a_cut_in_eight_bits_stays_in_eight_bits(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))

    def narrow(name: str) -> torch.Tensor:
        return source.read(name).to(torch.float8_e4m3fn)

    plan = [
        Planned(name, "F8_E4M3", entry.shape, partial(narrow, name))
        for name, entry in source.entries.items()
    ]
    eight = write_checkpoint(tmp_path / "eight", source.config, plan)
    result = cut(eight.path, [Keep(f"mlp.{i}", (0, 7)) for i in range(6)], tmp_path / "out")
    name = "model.layers.2.mlp.down_proj.weight"
    assert result.read(name).dtype == torch.float8_e4m3fn
    assert torch.equal(result.read(name).float(), eight.read(name).float()[:, [0, 7]])


# --- Overwrite ---------------------------------------------------------------------------------


def test_a_value_is_written_in_place_of_the_old(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama")
    new = torch.randn(32, 48)
    result = cut(path, [Overwrite(DOWN, lambda: new)], tmp_path / "out")
    before = load_file(path / "model.safetensors")
    assert torch.equal(result.read(DOWN), new)
    assert all(torch.equal(result.read(name), before[name]) for name in before if name != DOWN)


def test_a_value_is_cut_as_the_old_one_would_be(saved: Saved, tmp_path: Path) -> None:
    new = torch.randn(32, 48)
    edits: list[Edit] = [Overwrite(DOWN, lambda: new), Drop((0,))]
    edits += [Keep(f"mlp.{i}", (3, 5, 40)) for i in range(1, 6)]
    result = cut(saved("llama"), edits, tmp_path / "out")
    renamed = DOWN.replace("layers.3", "layers.2")
    assert torch.equal(result.read(renamed), new[:, [3, 5, 40]])


def test_values_are_made_one_at_a_time(saved: Saved, tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def value() -> torch.Tensor:
        nonlocal most
        made = torch.randn(32, 48)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    def edits() -> Iterator[Edit]:
        for i in range(6):
            yield Overwrite(f"model.layers.{i}.mlp.down_proj.weight", value)

    cut(saved("llama"), edits(), tmp_path / "out")
    assert len(alive) == 6
    assert most == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: torch.zeros(48, 32), "float32 [48, 32], expected float32 [32, 48]"),
        (lambda: torch.zeros(32, 48).half(), "float16 [32, 48], expected float32"),
        (lambda: torch.full((32, 48), float("nan")), "1536 values that are not finite"),
    ],
)
def test_a_value_that_is_not_like_the_old_is_refused(
    saved: Saved, tmp_path: Path, value: Callable[[], torch.Tensor], said: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        cut(saved("llama"), [Overwrite(DOWN, value)], tmp_path / "out")
    assert said in str(caught.value)
    assert caught.value.where == DOWN
    assert list((tmp_path / "out").iterdir()) == []


# --- Untie -------------------------------------------------------------------------------------

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def test_an_untied_head_is_a_copy_that_may_be_cut(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama", tie_word_embeddings=True)
    result = cut(path, [Untie(HEAD)], tmp_path / "out")
    model = loaded(result.path)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(logits(model), logits(loaded(path)))
    assert torch.equal(result.read(HEAD), result.read(EMBEDDING))
    smaller = cut(path, [Keep("residual", tuple(range(16))), Untie(HEAD)], tmp_path / "smaller")
    assert torch.equal(smaller.read(HEAD), result.read(HEAD)[:, :16])


def test_an_untied_head_may_have_values_of_its_own(saved: Saved, tmp_path: Path) -> None:
    path = saved("llama", tie_word_embeddings=True)
    own = torch.randn(64, 32)
    edits: list[Edit] = [Overwrite(HEAD, lambda: own), Drop((1,)), Untie(HEAD)]
    result = cut(path, edits, tmp_path / "out")
    assert torch.equal(result.read(HEAD), own)
    assert torch.equal(result.read(EMBEDDING), Checkpoint.open(path).read(EMBEDDING))
    assert loaded(result.path).config.num_hidden_layers == 5


def test_what_is_not_tied_cannot_be_untied(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="stored on its own already"):
        cut(saved("llama", tie_word_embeddings=False), [Untie(HEAD)], tmp_path / "out")
