from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prune_export.machine import Machine
from prune_export.verify.engine import Engine
from prune_export.verify.generation import (
    PROMPTS,
    _encoded,
    _fitting,
    distinct_share,
    is_broken,
    judge,
    measure_generation,
    repeated_share,
)
from tests.verify.tiny_checkpoint import save_tiny

VARIED = list(range(64))


def test_share_of_repeated_grams_by_hand() -> None:
    """abcd bcda cdab dabc abcd: the last of five occurred before."""
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share(VARIED) == 0
    assert repeated_share([1] * 7) == 0


@pytest.mark.parametrize(
    ("tokens", "text", "broken"),
    [
        (VARIED, "A plain sentence,\nwith two lines.", False),
        (VARIED, "cut off in a character \ufffd\ufffd", False),
        (VARIED, "undecodable \ufffd inside", True),
        (VARIED, "bell \x07", True),
        ([7] * 64, "!" * 64, True),
        ([7, 8] * 32, "ab" * 32, True),
        ([5, *[7, 8] * 31], "xab", False),
        ([7] * 5, "ha ha", False),
    ],
)
def test_broken(tokens: list[int], text: str, broken: bool) -> None:
    assert is_broken(tokens, text) is broken


def test_a_text_is_counted_once() -> None:
    """An empty, a broken, a repetitive and a good one; the broken one repeats as well."""
    loop = [1, 2, 3, 4, 5] * 12
    found = judge("dense", "abcd", [[], [7] * 64, loop, VARIED], [" ", "!!!", "loop", "good"])
    assert (found.prompts, found.empty, found.broken, found.repetitive) == (4, 1, 1, 1)
    assert found.examples[3] == {"prompt": "d", "text": "good"}


def test_prompts_go_through_the_chat_template(tmp_path: Path, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    plain = _encoded(tokenizer, "Hello")
    assert tokenizer.decode(plain) == "Hello"
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert tokenizer.decode(_encoded(tokenizer, "Hello")) == "<user>Hello<assistant>"


def test_templates_that_have_only_names_are_not_for_chats(tmp_path: Path, tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = {"rag": "R{{ messages[0].content }}", "tool_use": "T"}
    tokenizer.save_pretrained(tmp_path)
    named = AutoTokenizer.from_pretrained(tmp_path)
    assert named.decode(_encoded(named, "Hello")) == "Hello"
    tokenizer.chat_template["default"] = "D{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path)
    default = AutoTokenizer.from_pretrained(tmp_path)
    assert default.decode(_encoded(default, "Hello")) == "DHello"


def test_prompts_and_answers_fit_into_learned_positions() -> None:
    prompts = [list(range(20)), list(range(60))]
    assert _fitting(prompts, 64, None) == (prompts, 64)
    assert _fitting(prompts, 64, 124) == (prompts, 64)
    assert _fitting(prompts, 64, 100) == ([prompts[0], list(range(10, 60))], 50)
    assert _fitting(prompts, 64, 70) == ([prompts[0], list(range(25, 60))], 35)


@pytest.mark.slow
def test_random_models_do_not_speak(tmp_path: Path, machine: Machine) -> None:
    """A random model is caught: nearly every text is broken, repetitive or empty."""
    checkpoint = save_tiny(tmp_path / "random", layers=1)
    found = measure_generation("dense", Engine.pytorch(checkpoint), checkpoint, machine)
    assert found.prompts == len(PROMPTS) == len(found.examples)
    assert found.empty + found.broken + found.repetitive >= len(PROMPTS) - 2


def test_distinct_runs_are_counted_over_all_texts() -> None:
    texts = [[1, 2, 1, 2], [1, 2], []]
    assert distinct_share(texts, 1) == pytest.approx(2 / 6)
    assert distinct_share(texts, 2) == pytest.approx(2 / 4)
    assert distinct_share(texts, 3) == 1.0
    assert distinct_share(texts, 5) == 0.0
    found = judge("m", ["a"], [[1, 2, 3, 4]], ["text"])
    assert found.distinct == [1.0, 1.0, 1.0]
