"""Compares onnxruntime-genai's own tokenizer with the model's.

It reads the same files with code of its own, and may take spaces around special tokens, or a start
of a text, in another way. Engines are fed with ids and don't care; who types text into the runtime
does. So differences are told and fail nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from prune_export.system.bounded import bounded

DIFFERENT: Final = "onnxruntime-genai's own tokenizer gives other ids"
"""How a note begins that tells of a difference."""

_TEXTS: Final = (
    "Hello, world!",
    " a space before",
    "and after ",
    "two  and   three spaces\tand a tab",
    "first line\nsecond line\n\nand a paragraph\r\n",
    "In 1969 it cost $3.14159, or 1,234,567 times 0.001%.",
    "naïve café, Grüße, Ελλάδα, Привет, 你好世界, こんにちは, مرحبا, 👩‍👩‍👧 🚀",
    "e\u0301 is not \u00e9, and \u200b is no space",
    "def add(a: int, b: int) -> int:\n    return a + b  # {'sum': [a, b]}\n",
    "don't WON'T it's I'll",
)
_SPECIAL: Final = ("{0}Hello", "Hello{0} there", "Hello {0} there {0}", " {0}")
_MOST_SPECIAL: Final = 4
_TURNS: Final = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": " Thanks!\n"},
)
_SHOWN: Final = 3

Encode = Callable[[str], Sequence[int]]


def compared(source: Path, out: Path) -> str:
    """Compares the tokenizer of the engine in `out` with that of the model in `source`: a note."""
    try:
        import onnxruntime_genai as og

        from prune_export.checkpoint.loading import load_tokenizer

        tokenizer = load_tokenizer(source)
        own = og.Tokenizer(og.Model(str(out)))
        texts = list(dict.fromkeys(samples(tokenizer)))
        return note(
            texts, lambda text: tokenizer(text)["input_ids"], lambda text: own.encode(text).tolist()
        )
    except Exception as error:  # whatever it is: the engine is no worse for it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"onnxruntime-genai's own tokenizer could not be compared: {reason:.200}"


def samples(tokenizer: Any) -> Iterator[str]:
    """Texts on which tokenizers are known to differ, some with this one's special tokens."""
    yield from _TEXTS
    for token in tokenizer.all_special_tokens[:_MOST_SPECIAL]:
        for form in _SPECIAL:
            yield form.format(token)
    named = tokenizer.chat_template
    if named and (not isinstance(named, dict) or "default" in named):
        for turns in (list(_TURNS[:1]), list(_TURNS)):
            with bounded():
                text = tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=False
                )
            yield str(text)


def note(texts: Sequence[str], wanted: Encode, got: Encode) -> str:
    """Says how many of the texts have other ids, and the first of them."""
    other = [text for text in texts if list(wanted(text)) != [int(token) for token in got(text)]]
    if not other:
        return f"onnxruntime-genai's own tokenizer gives the same ids for {len(texts)} texts"
    shown = ", ".join(f"{text!r:.60}" for text in other[:_SHOWN])
    more = ", …" if len(other) > _SHOWN else ""
    return (
        f"{DIFFERENT} for {len(other)} of {len(texts)} texts ({shown}{more}): feed it those of "
        "transformers' tokenizer (`generator.append_tokens(tokenizer(text)['input_ids'])`)"
    )
