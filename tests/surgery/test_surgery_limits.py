"""What surgery carries along besides weights, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prune_export.checkpoint import Checkpoint
from prune_export.errors import CheckpointError, PlanError
from prune_export.surgery import (
    Drop,
    Edit,
    Edits,
    Keep,
    Overwrite,
    rewrite,
)
from prune_export.surgery.rewriting import _refuse_unsayable
from tests.saved_models import maker
from tests.surgery.surgery_calls import DOWN, RAM, Saved, cut, loaded


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return maker(tmp_path_factory.mktemp)


# --- what comes along --------------------------------------------------------------------------


def test_the_config_keeps_its_order_and_loses_what_points_elsewhere(
    saved: Saved, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved("gemma2"), path)
    config = json.loads((path / "config.json").read_text())
    stray = {"auto_map": {"AutoModel": "x.Y"}, "_name_or_path": "somewhere"}
    shuffled = {key: config[key] for key in sorted(config, reverse=True)} | stray
    (path / "config.json").write_text(json.dumps(shuffled))
    result = cut(path, [Drop((0, 1))], tmp_path / "out")
    assert list(result.config) == [key for key in shuffled if key not in stray]
    assert result.config["num_hidden_layers"] == 4
    assert result.config["layer_types"] == config["layer_types"][2:]


def test_tokenizer_and_generation_config_come_along(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in tiny_llama.iterdir():
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("yours")
    (tmp_path / "model" / "README.md").write_text("of another model")
    cut(tmp_path / "model", [Drop((2,))], tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        there = (tmp_path / "out" / name).read_bytes()
        assert there == (tmp_path / "model" / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()


def with_head(source: Path, path: Path, change: float) -> Path:
    """A copy of a tied model that stores its head again."""
    shutil.copytree(source, path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_stored_copy_of_a_tied_head_is_left_behind(saved: Saved, tmp_path: Path) -> None:
    path = with_head(saved("llama", tie_word_embeddings=True), tmp_path / "twice", 0.0)
    result = cut(path, [Drop((0,))], tmp_path / "out")
    assert "lm_head.weight" not in result.entries
    head = loaded(tmp_path / "out").lm_head.weight
    assert torch.equal(head, result.read("model.embed_tokens.weight"))


def test_a_head_that_is_no_copy_is_not_lost_in_silence(saved: Saved, tmp_path: Path) -> None:
    path = with_head(saved("llama", tie_word_embeddings=True), tmp_path / "other", 1.0)
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens\.weight"):
        cut(path, [Drop((0,))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what cannot be ----------------------------------------------------------------------------

ZERO = torch.zeros


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([Drop(())], None),
        ([Drop((6,))], "layers 0 to 5"),
        ([Drop(tuple(range(6)))], "all 6 blocks would be dropped"),
        ([Keep("mpl.0", (0,))], "did you mean `mlp.0`"),
        ([Keep("mlp.0", ())], "expected ascending positions below 48"),
        ([Keep("mlp.0", (3, 2))], "got an index of 2 positions [3, 2]"),
        ([Keep("mlp.0", (3, 3))], "expected ascending positions"),
        ([Keep("mlp.0", (-1, 3))], "expected ascending positions"),
        ([Keep("mlp.0", (0, 48))], "below 48"),
        ([Keep("mlp.0", (0,)), Keep("mlp.0", (1,))], "is cut by two edits"),
        ([Keep("mlp.3", (0, 1))], "has sizes [2, 48] in different places"),
        ([Keep("mlp.3", (0, 1)), Drop((3,))], "its block is dropped"),
        ([Overwrite(DOWN, lambda: ZERO(1)), Drop((3,))], "its block is dropped"),
        ([Overwrite(DOWN, lambda: ZERO(1))] * 2, "is overwritten twice"),
        ([Overwrite("model.norm.weigth", lambda: ZERO(1))], "did you mean `model.norm.weight`"),
        ([Overwrite("lm_head.weight", lambda: ZERO(1))], "overwrite model.embed_tokens.weight"),
    ],
)
def test_edits_that_cannot_be_are_refused_before_anything_is_written(
    saved: Saved, tmp_path: Path, edits: list[Edit], said: str | None
) -> None:
    path = saved("llama", tie_word_embeddings=True)
    if said is None:
        assert cut(path, edits, tmp_path / "out").arch().layers == 6
        return
    with pytest.raises(PlanError) as caught:
        cut(path, edits, tmp_path / "out")
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_size_that_transformers_refuses_is_refused_before_anything_is_written(
    saved: Saved, tmp_path: Path
) -> None:
    path = saved("llama", head_dim=8, num_attention_heads=8, num_key_value_heads=2)
    edits = [Keep(f"group.{i}", (0, 1, 2)) for i in range(6)]  # 6 heads; 32 / 6 leaves a rest
    with pytest.raises(PlanError, match="divides hidden_size"):
        cut(path, edits, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_config_that_would_not_say_what_was_cut_is_refused(saved: Saved, tmp_path: Path) -> None:
    source = Checkpoint.open(saved("llama"))
    after = source.arch().without((0,))
    with pytest.raises(PlanError, match="could not say what is cut"):
        _refuse_unsayable(source.config, after, tmp_path)
    with pytest.raises(PlanError, match="would be a model that transformers refuses"):
        _refuse_unsayable({**source.config, "hidden_size": "wide"}, after, tmp_path)


def test_a_source_that_is_not_the_architecture_is_refused(saved: Saved, tmp_path: Path) -> None:
    arch = Checkpoint.open(saved("llama", intermediate_size=96)).arch()
    with pytest.raises(CheckpointError, match="got shape"):
        rewrite(Checkpoint.open(saved("llama")), arch, [], tmp_path / "out", ram_bytes=RAM)
    assert not (tmp_path / "out").exists()


def test_what_edits_leave_is_known_without_weights(saved: Saved) -> None:
    arch = Checkpoint.open(saved("llama")).arch()
    edits: list[Edit] = [Drop((0, 1)), *(Keep(f"mlp.{i}", tuple(range(16))) for i in range(2, 6))]
    after = Edits.of(edits, arch).after(arch)
    assert after.layers == 4
    assert {after.sizes[f"mlp.{i}"] for i in range(4)} == {16}
