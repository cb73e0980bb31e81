"""A head that config.json ties to the embedding: what is stored of the two is what counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Work
from prune_export.errors import CheckpointError
from prune_export.exporters.onnx import Onnx
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.surgery import rewrite

Saved = Callable[..., Path]
EMBED = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
MACHINE = Machine("cpu", 4 << 30, 0, 1)
IDS = torch.tensor([[5, 9, 40, 3, 17, 22]])


def changed(source: Path, out: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    shutil.copytree(source, out)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def logits(model: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(model).eval()(IDS).logits


def rewritten(model: Path, out: Path) -> Path:
    opened = Checkpoint.open(model)
    rewrite(opened, opened.arch(), [], out, ram_bytes=1 << 30)
    return out


@pytest.mark.parametrize("family", EMBED)
def test_of_a_pair_the_head_alone_may_be_stored(family: str, saved: Saved, tmp_path: Path) -> None:
    dense, embed = saved(family, tie_word_embeddings=True), EMBED[family]
    only = changed(
        dense, tmp_path / "only",
        lambda held: {"lm_head.weight" if n == embed else n: v for n, v in held.items()},
    )  # fmt: skip
    opened = Checkpoint.open(only)
    assert embed in opened.entries and "lm_head.weight" not in opened.entries
    assert torch.equal(opened.read(embed), load_file(only / "model.safetensors")["lm_head.weight"])
    again = rewritten(only, tmp_path / "again")
    assert torch.equal(logits(only), logits(dense))
    assert torch.equal(logits(again), logits(only))
    assert embed in load_file(again / "model.safetensors")


@pytest.mark.slow
def test_an_engine_of_a_head_that_is_stored_alone(saved: Saved, tmp_path: Path) -> None:
    """The export compares itself with PyTorch of the same files."""
    only = changed(
        saved("llama", tie_word_embeddings=True), tmp_path / "only",
        lambda held: {"lm_head.weight" if n == EMBED["llama"] else n: v for n, v in held.items()},
    )  # fmt: skip
    Onnx().export(only, tmp_path / "onnx", Work(MACHINE, Silent(), tmp_path))
    with Onnx().open(tmp_path / "onnx", MACHINE) as runner:
        got, _ = runner.step(IDS.numpy())
    assert torch.allclose(torch.from_numpy(got), logits(only), atol=1e-4)


@pytest.mark.parametrize("family", EMBED)
def test_two_that_are_equal_are_one(family: str, saved: Saved, tmp_path: Path) -> None:
    dense, embed = saved(family, tie_word_embeddings=True), EMBED[family]
    both = changed(
        dense, tmp_path / "both", lambda held: held | {"lm_head.weight": held[embed].clone()}
    )
    opened = Checkpoint.open(both)
    assert opened.redundant(opened.arch()) == ("lm_head.weight",)
    again = rewritten(both, tmp_path / "again")
    assert "lm_head.weight" not in load_file(again / "model.safetensors")
    assert torch.equal(logits(again), logits(both))


@pytest.mark.parametrize("family", EMBED)
def test_two_that_differ_are_refused_until_config_json_says_so(
    family: str, saved: Saved, tmp_path: Path
) -> None:
    """transformers keeps both apart, so that taking the embedding for both is another model."""
    dense, embed = saved(family, tie_word_embeddings=True), EMBED[family]

    def with_other(held: dict[str, Any]) -> dict[str, Any]:
        head = held[embed].clone()
        head[-1, -1] += 1
        return held | {"lm_head.weight": head}

    both = changed(dense, tmp_path / "both", with_other)
    assert not torch.equal(logits(both), logits(dense))
    with pytest.raises(CheckpointError, match=f"differs from {embed}") as caught:
        Checkpoint.open(both).arch()
    assert '"tie_word_embeddings": false' in caught.value.fix
    config = json.loads((both / "config.json").read_text()) | {"tie_word_embeddings": False}
    kept_apart = logits(both)
    (both / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(both), kept_apart)
    again = rewritten(both, tmp_path / "again")
    assert torch.equal(logits(again), kept_apart)


@pytest.mark.parametrize("lost", ["lm_head.weight", EMBED["llama"]])
def test_half_of_an_untied_pair_is_incomplete(lost: str, saved: Saved, tmp_path: Path) -> None:
    """transformers fills the other half with random numbers."""
    half = changed(
        saved("llama", tie_word_embeddings=False), tmp_path / "half",
        lambda held: {name: values for name, values in held.items() if name != lost},
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="is missing"):
        Checkpoint.open(half).arch()
