"""Text of tokens while they come: the same as of all at once, and never past a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("prune_export_server.text")

from prune_export_server.text import _BYTES, Detokenizer, Stopper, Words, decoded

from prune_export.plugins import load_tokenizer


def test_pieces_joined_are_the_text_and_no_character_is_cut(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = "Grüße 模型🦙 und <br>\n  weiter"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    words = Detokenizer(tokenizer, tokens[:2])
    pieces = [words.add(token) for token in tokens[2:]]
    assert "\ufffd" not in "".join(pieces)
    assert decoded(tokenizer, tokens[:2]) + "".join(pieces) + words.finish() == text


def test_half_a_character_at_the_end_is_shown_as_such(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokens = tokenizer("🦙", add_special_tokens=False)["input_ids"]
    words = Detokenizer(tokenizer)
    assert [words.add(token) for token in tokens[:-1]] == [""] * (len(tokens) - 1)
    assert "\ufffd" in words.finish()


@given(some.lists(some.text(alphabet="ab", max_size=4)), some.text("ab", min_size=1, max_size=4))
def test_a_stop_string_ends_the_text_however_it_is_cut(parts: list[str], stop: str) -> None:
    stopper = Stopper([stop])
    found = "".join(stopper.add(part) for part in parts)
    whole = "".join(parts)
    assert stopper.met == (stop in whole)
    assert found + stopper.finish() == whole.partition(stop)[0]


def test_a_prompt_that_ends_within_a_character_is_gone_on_with(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    tokens = tokenizer("a🦙b", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 3
    words = Detokenizer(tokenizer, tokens[:2])
    assert "".join(words.add(token) for token in tokens[2:]) + words.finish() == "🦙b"


@pytest.fixture(scope="module")
def bytewise(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


@given(some.lists(some.sampled_from([0xF0, 0x9F, 0xA6, 0x99, 0xE2, 0x41]), max_size=60))
def test_broken_characters_are_shown_after_a_while_and_nothing_is_shown_twice(
    bytewise: Any, values: list[int]
) -> None:
    tokenizer = bytewise
    letters = {byte: letter for letter, byte in _BYTES.items()}
    tokens = [tokenizer.convert_tokens_to_ids(letters[value]) for value in values]
    words, found, held = Detokenizer(tokenizer), "", 0
    for token in tokens:
        piece = words.add(token)
        held = 0 if piece else held + 1
        assert held <= 12
        found += piece
    assert found + words.finish() == decoded(tokenizer, tokens)


def test_a_token_has_its_text_within_a_text_and_its_very_bytes(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    words = Words(tokenizer)
    tokens = tokenizer("a🦙 b", add_special_tokens=False)["input_ids"]
    raw = [byte for token in tokens for byte in words.bytes_of(token)]
    assert bytes(raw).decode() == "a🦙 b"
    end = tokenizer.eos_token_id
    assert words.word(end) == tokenizer.eos_token
    assert words.length(end) == 0


def test_a_space_before_a_word_is_not_lost() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.BPE({"▁the": 0, "<0xE2>": 1}, [], byte_fallback=True))
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    words = Words(PreTrainedTokenizerFast(tokenizer_object=plain))
    assert words.word(0) == " the"
    assert words.bytes_of(1) == [0xE2]
