"""Turns pydantic's errors into ours: the line of the recipe, the value, what to write."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from prune_export.errors import RecipeError, did_you_mean
from prune_export.recipe.document import Document, Path_, dotted
from prune_export.recipe.grid import TO_TARGET


def translated(
    document: Document, path: Path_, error: ValidationError, schema: type[BaseModel] | None = None
) -> RecipeError:
    """Translates pydantic's first error on the section at `path`, with its line and advice."""
    first = error.errors()[0]
    _, section = _follow(document.data, path)
    steps, written = _follow(section, first["loc"])
    at: Path_ = (*path, *steps)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(schema, first["loc"][:-1]) if schema else ()
        return RecipeError(
            document.where(at),
            f"`{first['loc'][-1]}` is not a key here",
            did_you_mean(str(first["loc"][-1]), known),
        )
    if first["type"] in ("missing", "missing_argument"):
        return RecipeError(document.where(path), f"has no `{dotted(first['loc'])}`", "add it")
    if written == TO_TARGET:
        return RecipeError(
            document.where(at),
            f"got `{TO_TARGET}`, which stands for a fraction, and this key takes none",
            "write it where a fraction is expected, such as `sparsity`",
        )
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    what = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    what = (what[0].lower() + what[1:]).replace("valid tuple", "list")
    return RecipeError(
        document.where(at), f"got {first['input']!r:.80}: {what}{more}", _advice(first)
    )


def _follow(data: Any, steps: Sequence[Any]) -> tuple[tuple[str | int, ...], Any]:
    """Follows pydantic's steps into the data: the steps that exist there, and the value at the end.

    Pydantic names alternatives of a type as steps, and a search's parts are checked as stages.
    """
    known: list[str | int] = []
    for step in steps:
        if (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        ):
            data = data[step]
        else:
            continue
        known.append(step)
    return tuple(known), data


def _keys_at(schema: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: Any = schema
    for step in path:
        if isinstance(step, int):
            continue
        if not issubclass(current, BaseModel) or step not in current.model_fields:
            continue  # a dataclass holds no other schema
        annotation = current.model_fields[step].annotation
        parts = [annotation, *getattr(annotation, "__args__", ())]
        current = next((part for part in parts if _is_schema(part)), current)
    return list(_fields(current))


def _fields(schema: Any) -> Mapping[str, Any]:
    """The keys of a schema, which is a model or a dataclass."""
    known: Mapping[str, Any] = (
        schema.model_fields if issubclass(schema, BaseModel) else schema.__dataclass_fields__
    )
    return known


def _is_schema(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, BaseModel) or is_dataclass(kind))


def _advice(first: Any) -> str:
    limits = first.get("ctx") or {}
    value = first["input"]
    if isinstance(value, str) and (pair := re.fullmatch(r"(\d+):(\d+)", value)):
        kept, of = pair.groups()
        return (
            f"write `{{keep: {kept}, of: {of}}}`: some write the kept weights first, some the zeros"
        )
    if (
        first["type"] in ("less_than", "less_than_equal")
        and isinstance(value, int | float)
        and limits.get("lt", limits.get("le")) == 1
        and 1 <= value <= 100
    ):
        return f"write `{value / 100:g}` for {value:g} %"
    if first["type"] in ("tuple_type", "list_type") and isinstance(value, str | int | float):
        return f"write a list: `[{value}]`"
    if first["type"] == "literal_error":
        return did_you_mean(
            str(value),
            [
                word.strip("'")
                for word in str(limits.get("expected", "")).replace(" or ", ", ").split(", ")
            ],
        )
    return ""
