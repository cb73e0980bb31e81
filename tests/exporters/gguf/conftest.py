"""Tiny models with a tokenizer that has merges, as GGUF needs one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.saved_models import maker

VOCABULARY = 288
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n")]


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *("".join(pair) for pair in MERGES)]
    raw = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=MERGES)
    )
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    save = maker(lambda name: tmp_path_factory.mktemp("gguf") / name)

    def make(model_type: str, **changes: object) -> Path:
        folder = save(model_type, vocab_size=VOCABULARY, **changes)  # type: ignore[arg-type]
        if not (folder / "tokenizer.json").exists():
            save_tokenizer(folder)
        return folder

    return make
