"""Models and tokenizers load as data: code beside them is not run, an adapter is not picked up."""

from __future__ import annotations

import builtins
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.loading import load_config, load_ends, load_model, load_tokenizer
from prune_export.cli.engines import verified
from prune_export.errors import CheckpointError
from prune_export.execution import Options, run
from prune_export.machine import Machine
from prune_export.progress import Silent
from prune_export.recipe import Recipe

CODE = """\
from pathlib import Path

from transformers import PreTrainedTokenizerFast

Path({marker!r}).write_text("run")


class Theirs(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def coded(tiny_llama: Path, tmp_path: Path) -> Path:
    """A model whose tokenizer, and config, name code that lies beside them."""
    path = tmp_path / "coded"
    shutil.copytree(tiny_llama, path)
    (path / "theirs.py").write_text(CODE.format(marker=str(tmp_path / "marker")), encoding="utf-8")
    for name, said in {
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]},
            "tokenizer_class": "Theirs",
        },
        "config.json": {"auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}},
    }.items():
        known = json.loads((path / name).read_text(encoding="utf-8"))
        (path / name).write_text(json.dumps(known | said), encoding="utf-8")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Questions that were asked; whoever asks hears `y`. Code that is run leaves a marker."""
    questions: list[str] = []

    def answer(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return questions


def test_transformers_would_ask_and_run(coded: Path, tmp_path: Path, asked: list[str]) -> None:
    AutoTokenizer.from_pretrained(coded, local_files_only=True)
    assert asked and (tmp_path / "marker").exists()


def test_a_tokenizer_with_code_is_read_from_its_tokenizer_json(
    coded: Path, tiny_llama: Path, tmp_path: Path, asked: list[str]
) -> None:
    text = "The river runs. "
    assert load_tokenizer(coded)(text)["input_ids"] == load_tokenizer(tiny_llama)(text)["input_ids"]
    assert load_tokenizer(coded).eos_token_id == 1
    assert load_config(coded).model_type == "llama"
    assert load_model(coded).config.num_hidden_layers == 6
    assert not asked and not (tmp_path / "marker").exists()


def test_a_tokenizer_of_nothing_but_code_is_refused(
    coded: Path, tmp_path: Path, asked: list[str]
) -> None:
    (coded / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)auto_map\n.*never run\n.*tokenizer\.json"):
        load_tokenizer(coded)
    assert not asked and not (tmp_path / "marker").exists()


@pytest.mark.parametrize("said", [3, "theirs.Theirs", ["theirs.Theirs"], {"AutoTokenizer": []}, {}])
def test_any_shape_of_auto_map_ends_in_a_tokenizer_or_three_lines(
    coded: Path, tmp_path: Path, asked: list[str], said: Any
) -> None:
    known = json.loads((coded / "tokenizer_config.json").read_text(encoding="utf-8"))
    known["auto_map"] = said
    (coded / "tokenizer_config.json").write_text(json.dumps(known), encoding="utf-8")
    assert load_tokenizer(coded).eos_token_id == 1
    assert not asked and not (tmp_path / "marker").exists()


@pytest.mark.slow
def test_a_run_and_verify_neither_ask_nor_run_it(
    coded: Path, tmp_path: Path, asked: list[str]
) -> None:
    recipe = Recipe.parse(
        "recipe: 1\nstages:\n  - prune: {method: deepest, remove: 4}\n"
        "verify: {parity: false, generation: true}\n"
    )
    machine = Machine.detect(device="cpu", threads=1)
    out = run(recipe, str(coded), Options(tmp_path / "out", tmp_path / "store", machine)).out
    assert "auto_map" in (out / "tokenizer_config.json").read_text(encoding="utf-8")
    shutil.copy(coded / "theirs.py", out)
    found = verified(out, [], samples=1, length=32, trust=False, store=tmp_path / "store",
                     machine=machine, progress=Silent())  # fmt: skip
    assert found.generation[0].prompts and found.reload.ok and not found.reload.own_code
    assert not asked and not (tmp_path / "marker").exists()


def give_adapter(path: Path) -> None:
    """Puts an adapter that changes every logit beside the weights, as peft writes it."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(load_model(path), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=10.0)
    adapted.save_pretrained(path)
    assert (path / "adapter_config.json").exists()


@torch.inference_mode()
def test_an_adapter_beside_the_weights_is_not_picked_up(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "adapted"
    shutil.copytree(tiny_llama, path)
    ids = torch.arange(2, 12)[None]
    plain = load_model(path)(ids).logits
    give_adapter(path)
    # This is what transformers does unless told otherwise: the test would prove nothing without.
    stock = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
    assert not torch.allclose(stock(ids).logits, plain, atol=1e-3)
    assert torch.equal(load_model(path)(ids).logits, plain)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_an_adapter_beside_the_weights_is_refused_with_what_to_do(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "adapted"
    shutil.copytree(tiny_llama, path)
    (path / name).write_bytes(b"{}")
    for weights in (True, False):
        with pytest.raises(CheckpointError, match=rf"(?s){name}\n.*adapter.*\n.*merge it first"):
            Checkpoint.open(path, weights=weights)


def test_ends_are_read_as_numbers(tmp_path: Path) -> None:
    assert load_ends(tmp_path) == frozenset()
    for said, expected in (("2", {2}), ("[1, 2]", {1, 2}), ("null", set())):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {said}}}')
        assert load_ends(tmp_path) == expected
    for said in ('"2"', "[[1]]", "true", "-1", "{}"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {said}}}')
        with pytest.raises(CheckpointError, match="expected a token's number"):
            load_ends(tmp_path)
