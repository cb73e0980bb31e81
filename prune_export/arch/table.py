"""A family's table: what its models look like on disk, as data.

One YAML file in `families/` describes every model type of a family. `docs/architectures.md` shows
how to write one; the contract test proves it against a tiny random model of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from prune_export.errors import UnsupportedArch, did_you_mean


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Axis(_Frozen):
    """A named size: an expression over config keys, the same in every layer or its own in each."""

    size: str
    per_layer: bool = False


class TensorRow(_Frozen):
    """One tensor of the table.

    `name` is the stored name; inside `block` it is relative to the block and may hold `{expert}`.
    `when` is a condition over config keys (`attention_bias`, `not bias`, `activation == gelu`).
    `layers` limits a row to a named layer set of the table.
    """

    name: str
    role: str
    dims: str
    when: str | None = None
    layers: str | None = None
    tied_to: str | None = None
    tied_when: str | None = None


class LayerSet(_Frozen):
    """Layers chosen by config: those with (i + 1) divisible by `every`, less those in `excluding`.

    After a depth cut the set is written back as `every: 1` and the renumbered rest in `excluding`.
    """

    every: str
    excluding: str


class ConfigRules(_Frozen):
    """What each config key means for a cut.

    `accepts` limits a key to values that this table is true for. `per_layer` are lists with one
    entry a layer. `known` are keys that need no change. `depth_requires` are keys that must have
    the value given before blocks may be dropped, because the computation depends on the layer's
    number.
    """

    accepts: dict[str, list[Any]] = Field(default_factory=dict)
    per_layer: list[str] = Field(default_factory=list)
    known: list[str] = Field(default_factory=list)
    depth_requires: dict[str, Any] = Field(default_factory=dict)


class Table(_Frozen):
    """A family.

    `ignored_tensors` are ends of names (`rotary_emb.inv_freq`) of buffers that old releases of
    transformers stored and that carry nothing: they are accepted, and left behind.
    """

    family: str
    model_types: list[str]
    architectures: list[str]
    source: str
    layers: str
    blocks: str
    axes: dict[str, Axis]
    layer_sets: dict[str, LayerSet] = Field(default_factory=dict)
    head: list[TensorRow]
    block: list[TensorRow]
    tail: list[TensorRow]
    config: ConfigRules
    activations: list[str] = Field(default_factory=list)
    ignored_tensors: list[str] = Field(default_factory=list)
    notes: str = ""


@cache
def tables() -> Mapping[str, Table]:
    """Every table, by model type."""
    found: dict[str, Table] = {}
    for entry in sorted(files("prune_export.arch").joinpath("families").iterdir(), key=str):
        if entry.name.endswith(".yaml") and not entry.name.startswith("_"):
            table = Table.model_validate(yaml.safe_load(entry.read_text(encoding="utf-8")))
            found |= dict.fromkeys(table.model_types, table)
    return found


@cache
def common_keys() -> frozenset[str]:
    """Config keys that any family may carry and that never change the decoder's computation."""
    text = files("prune_export.arch").joinpath("families/_common.yaml").read_text(encoding="utf-8")
    return frozenset(yaml.safe_load(text)["known"])


def table_for(model_type: str) -> Table:
    """The table of a model type.

    Raises:
        UnsupportedArch: no table describes it.
    """
    known = tables()
    if model_type not in known:
        raise UnsupportedArch(
            "config.json  model_type",
            f"got {model_type!r}, which no architecture table describes",
            did_you_mean(model_type, known)
            or "add prune_export/arch/families/<family>.yaml (docs/architectures.md)",
        )
    return known[model_type]


def value(expression: str, config: Mapping[str, Any]) -> int:
    """Evaluates `a | b / c`: alternatives in order, the first without a missing key; integers only.

    Raises:
        UnsupportedArch: no alternative has all of its keys, or a division leaves a rest.
    """
    for alternative in expression.split("|"):
        terms = re.findall(r"[*/]|[A-Za-z_][A-Za-z0-9_]*|[0-9]+", alternative)
        numbers = [
            int(term) if term.isdecimal() else config.get(term)
            for term in terms
            if term not in "*/"
        ]
        if any(number is None for number in numbers):
            continue
        total = int(numbers[0])
        for sign, number in zip((t for t in terms if t in "*/"), numbers[1:], strict=True):
            if sign == "/" and total % int(number):
                raise UnsupportedArch(
                    "config.json", f"{alternative.strip()} leaves a rest: {total} / {number}"
                )
            total = total * int(number) if sign == "*" else total // int(number)
        return total
    raise UnsupportedArch(
        "config.json",
        f"has none of what `{expression}` needs",
        "the config is incomplete; load and save it once with transformers",
    )


Verdict = Literal[True, False]


def holds(condition: str | None, config: Mapping[str, Any]) -> bool:
    """Whether a row's condition is true of a config; None is always true."""
    if condition is None:
        return True
    if " and " in condition:
        return all(holds(part, config) for part in condition.split(" and "))
    for sign, equal in ((" == ", True), (" != ", False)):
        if sign in condition:
            key, wanted = condition.split(sign)
            return (str(config.get(key.strip())) == wanted.strip()) is equal
    if condition.startswith("not "):
        return not config.get(condition[4:].strip())
    return bool(config.get(condition.strip()))
