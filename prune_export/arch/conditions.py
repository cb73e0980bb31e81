"""Evaluates the expressions of a table: sizes over config keys, and conditions on them.

head_dim | hidden_size / num_attention_heads     the first alternative with no missing key
kv * group + 1                                   left to right, integers only
ff * 2 // 3 ^ 256                                `//` drops the rest, `^` rounds up to multiples
attention_bias and not use_gelu                  true of the config's values
word_embed_proj_dim != hidden_size               the right side is a key's value, or a word
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from prune_export.errors import UnsupportedArch

LARGEST_SIZE: Final = 2**40
"""No axis is longer; the longest of 2026, a vocabulary, has 262,144."""

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TERM = re.compile(r"//|[+*/^]|[A-Za-z_][A-Za-z0-9_]*|[0-9]+")
_SIGNS: Final = ("+", "*", "/", "//", "^")
_TEST = re.compile(r"(?P<no>not +)?(?P<key>\w+)(?: *(?P<sign>==|!=) *(?P<value>\S+))?")


def keys_of(text: str) -> frozenset[str]:
    """The config keys that a size or a condition reads; a word compared with may not be one."""
    left = re.sub(r"(==|!=) *\S+", " ", text)
    return frozenset(_WORD.findall(left)) - {"and", "not"}


def value(expression: str, config: Mapping[str, Any]) -> int:
    """Evaluates a size such as `a | b / c`.

    Raises:
        UnsupportedArch: no alternative has all of its keys, a key is no integer, or a division
            leaves a rest.
    """
    for alternative in expression.split("|"):
        terms = _TERM.findall(alternative)
        operands = [term for term in terms if term not in _SIGNS]
        numbers = [_number(term, config) for term in operands]
        if any(number is None for number in numbers):
            continue
        total = numbers[0] or 0
        for sign, number in zip((t for t in terms if t in _SIGNS), numbers[1:], strict=True):
            if sign == "*":
                total *= number or 0
            elif sign == "+":
                total += number or 0
            elif sign in ("//", "^") and number:
                total = total // number if sign == "//" else -(-total // number) * number
            elif not number or total % number:
                raise UnsupportedArch(
                    "config.json", f"{alternative.strip()} leaves a rest: {total} / {number}"
                )
            else:
                total //= number
        return total
    raise UnsupportedArch(
        "config.json",
        f"has none of what `{expression}` needs",
        "the config is incomplete: load it and save it once with transformers",
    )


def holds(condition: str | None, config: Mapping[str, Any]) -> bool:
    """Whether a condition is true of a config; None is always true.

    Raises:
        ValueError: it is not a condition.
    """
    return condition is None or all(_holds(part, config) for part in condition.split(" and "))


def _holds(test: str, config: Mapping[str, Any]) -> bool:
    match = _TEST.fullmatch(test.strip())
    if match is None or (match["no"] and match["sign"]):
        raise ValueError(f"{test!r} is not a condition")
    got = config.get(match["key"])
    if match["sign"] is None:
        return bool(got) is not bool(match["no"])
    wanted = config.get(match["value"], match["value"])
    return (str(got) == str(wanted)) is (match["sign"] == "==")


def _number(term: str, config: Mapping[str, Any]) -> int | None:
    got = int(term) if term.isdecimal() else config.get(term)
    if got is not None and (not isinstance(got, int) or isinstance(got, bool)):
        raise UnsupportedArch(f"config.json  {term}", f"got {got!r:.60}, expected one integer")
    if got is not None and abs(got) > LARGEST_SIZE:
        raise UnsupportedArch(
            f"config.json  {term}",
            f"got a number of {got.bit_length()} bits, expected at most {LARGEST_SIZE:,}",
            "the config is damaged: fetch it again",
        )
    return got
