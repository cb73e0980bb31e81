"""onnxruntime-genai's own tokenizer beside the model's: differences are told and fail nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AddedToken, AutoTokenizer

from prune_export.exporters.ort_genai import OrtGenai
from prune_export.exporters.ort_genai.tokens import DIFFERENT, compared, note, samples
from tests.exporters.ort_genai.test_ort_genai import export, model_in


def test_the_note_counts_and_shows_what_differs() -> None:
    letters = ["a", "b", "c", "d", "e"]
    assert note(letters, lambda t: [ord(t)], lambda t: [ord(t)]).endswith("same ids for 5 texts")
    told = note(letters, lambda t: [1], lambda t: [1 if t == "a" else 2])
    assert told.startswith(f"{DIFFERENT} for 4 of 5 texts ('b', 'c', 'd', …)")
    assert "append_tokens" in told


def test_texts_have_this_tokenizers_special_tokens_and_chats(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = list(samples(tokenizer))
    assert {"<s>Hello", "Hello <s> there <s>", " </s>"} <= set(texts)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chats = [text for text in samples(tokenizer) if text not in texts]
    assert chats[0] == "[user]What is 2 + 2?"
    assert "[assistant]It is 4." in chats[1]
    tokenizer.chat_template = {"rag": "{{ messages }}"}
    assert list(samples(tokenizer)) == texts


def test_what_cannot_be_compared_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    assert "could not be compared: " in compared(tiny_llama, tmp_path)


@pytest.mark.usefixtures("genai_in_this_process")
@pytest.mark.slow
def test_a_space_before_a_special_token_is_told_in_the_build_record(tmp_path: Path) -> None:
    model_in(tmp_path / "model", "Llama", {"num_hidden_layers": 1})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    strips = AddedToken("<|x|>", special=True, lstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [strips]})
    tokenizer.save_pretrained(tmp_path / "model")
    record = export(OrtGenai(), tmp_path / "model", tmp_path / "out")
    assert record.notes[-1].startswith(f"{DIFFERENT} for 2 of ")
    assert "'Hello <|x|> there <|x|>'" in record.notes[-1]
