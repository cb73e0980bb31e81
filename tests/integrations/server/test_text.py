"""Text of tokens while they come: the same as of all at once, and never past a stop string."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

pytest.importorskip("prune_export_server.text")

from prune_export_server.text import Detokenizer, Stopper, decoded

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
