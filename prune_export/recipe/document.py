"""Parses YAML into plain data with line numbers; refuses all that could run code or explode.

The scalars are those of the YAML 1.2 core schema, so `no` and `on` are words and `3e-4` is a
number. Tags, anchors, aliases and merge keys are refused; size, depth and node count are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from prune_export.errors import RecipeError
from prune_export.system.files import read_regular_text

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 24
MAX_NODES: Final = 20_000

Path_ = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Final[Mapping[str, Any]] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}


@dataclass(frozen=True)
class Document:
    """Parsed data, and for each path in it the place (`file:line`) where it was written."""

    data: Any
    places: Mapping[Path_, str] = field(default_factory=dict)

    def where(self, path: Path_) -> str:
        """Words a place: `file:line  key.path`, of the nearest line that is known."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return f"{self.places[path[:length]]}  {dotted(path)}".rstrip()
        return dotted(path)


def dotted(path: Path_) -> str:
    """Writes a path: `stages.0.prune` for ("stages", 0, "prune")."""
    return ".".join(str(step) for step in path)


def read(file: Path) -> Document:
    """Reads a document from a file.

    Raises:
        RecipeError: it cannot be read, is too large, or is not plain YAML.
    """
    text = read_regular_text(file, MAX_BYTES, "a recipe, a page of text", error=RecipeError)
    return parse(text, str(file))


def parse(text: str, name: str) -> Document:
    """Parses a document from a text; `name` stands for the file in places.

    Raises:
        RecipeError: it is not plain YAML, with line.
    """
    try:
        _refuse_tricks(text, name)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line + 1) if error.problem_mark else 1
        raise RecipeError(
            f"{name}:{line}",
            f"is not YAML: {error.problem or error.context}",
            "check the indentation and the quotes of this line and the one above",
        ) from None
    except yaml.YAMLError as error:
        raise RecipeError(name, f"is not YAML: {error}", "check for control characters") from None
    except (ValueError, OverflowError):  # from chr(), which the parser trusts
        raise RecipeError(
            name, "has an escape such as \\UFFFFFFFF that is no character", "write the character"
        ) from None
    places: dict[Path_, str] = {}
    return Document(_plain(node, (), name, places) if node else None, places)


def _refuse_tricks(text: str, name: str) -> None:
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if anchor:
            raise RecipeError(
                f"{name}:{line}",
                f"uses the anchor or alias `{anchor}`",
                "write the value out; recipes have no anchors",
            )
        if tag:
            raise RecipeError(
                f"{name}:{line}", f"uses the tag `{tag}`", "remove it; recipes are plain data"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in getattr(event, "value", None) or ""):
            raise RecipeError(
                f"{name}:{line}",
                "holds half of a surrogate pair, which is no character",
                "write the character itself",
            )
        if isinstance(event, yaml.DocumentStartEvent) and nodes:
            raise RecipeError(f"{name}:{line}", "starts a second document", "keep one per file")
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise RecipeError(
                f"{name}:{line}",
                f"is nested deeper than {MAX_DEPTH} or has more than {MAX_NODES:,} values",
                "is this a recipe?",
            )


def _plain(node: yaml.Node, path: Path_, name: str, places: dict[Path_, str]) -> Any:
    places.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), name, places) for i, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            raise RecipeError(f"{name}:{line}", "has a key that is not a word", "use plain keys")
        if key.value in found:
            raise RecipeError(
                f"{name}:{line}  {dotted((*path, key.value))}",
                "is written twice",
                "keep one of the two",
            )
        places[(*path, key.value)] = f"{name}:{line}"
        found[key.value] = _plain(value, (*path, key.value), name, places)
    return found


def scalar(text: str) -> Any:
    """Parses an unquoted YAML 1.2 scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 40 else text
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def merged(base: Document, over: Document) -> Document:
    """Merges `over` into `base`: mappings key by key, null removes, all else is replaced.

    Source: JSON Merge Patch, RFC 7386.
    """
    places = dict(base.places)

    def lay(below: Any, above: Any, path: Path_) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            laid = {key: lay(below.get(key), over, (*path, key)) for key, over in above.items()}
            return {key: value for key, value in (below | laid).items() if value is not None}
        for place in [place for place in places if place[: len(path)] == path]:
            del places[place]
        return above

    data = lay(base.data, over.data, ())
    return Document(data, places | dict(over.places))


def assigned(document: Document, assignment: str) -> Document:
    """Sets one `key.path=value` in a document, the value read as YAML.

    Raises:
        RecipeError: no `=`, a path through something that is not a mapping or list, or an index
            past the end.
    """
    place = f"--set {assignment}"
    path_text, equals, value_text = assignment.partition("=")
    if not equals or not path_text:
        raise RecipeError(place, "is not `key.path=value`", "write `--set stages.0.prune.remove=6`")
    value = parse(value_text, place).data
    steps: list[str | int] = [int(s) if s.isdecimal() else s for s in path_text.split(".")]

    def put(data: Any, depth: int) -> Any:
        if depth == len(steps):
            return value
        step = steps[depth]
        if isinstance(data, list) and isinstance(step, int):
            if step >= len(data):
                raise RecipeError(
                    place,
                    f"{dotted(tuple(steps[:depth]))} has {len(data)} entries, "
                    f"so there is no {step}",
                    "count from 0",
                )
            return [put(x, depth + 1) if i == step else x for i, x in enumerate(data)]
        if data is None or isinstance(data, dict):
            data = data or {}
            return data | {str(step): put(data.get(str(step)), depth + 1)}
        raise RecipeError(
            place,
            f"{dotted(tuple(steps[:depth]))} is {data!r}, which has no `{step}`",
            "write the path as in the recipe, list places by number",
        )

    path: Path_ = tuple(steps)
    kept = {key: at for key, at in document.places.items() if key[: len(path)] != path}
    return Document(put(document.data, 0), kept | {path: place})


def leaves(data: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Yields every (path, scalar) of plain data."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            yield from leaves(value, (*path, i))
    else:
        yield path, data
