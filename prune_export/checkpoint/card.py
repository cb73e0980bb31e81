"""Reads the licence from a model directory's card."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml

from prune_export.errors import CheckpointError
from prune_export.system.files import is_regular, open_regular

_HEAD_BYTES: Final = 64 * 1024
"""A card's metadata is at its beginning; the rest of a README is never read."""

_DEEPEST: Final = 16
_LONGEST: Final = 100
_TEXT: Final = "tag:yaml.org,2002:str"


def card_license(folder: Path) -> str | None:
    """Reads the licence id from the metadata of a directory's README.md; None where it has none.

    A card that is broken, or no regular file, says none: no run need fail for it.
    """
    file = folder / "README.md"
    if not is_regular(file):
        return None
    try:
        with open_regular(file, None, "a model card") as stream:
            head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
    except (OSError, CheckpointError):
        return None
    parts = head.replace("\r\n", "\n").split("\n---", 1)
    if not head.startswith("---") or len(parts) != 2:
        return None
    try:
        said = _top_level(parts[0].removeprefix("---")).get("license")
    except (yaml.YAMLError, ValueError, OverflowError):  # the latter two: `"\UFFFFFFFF"`
        return None
    return said if said and said.isprintable() and len(said) <= _LONGEST else None


def _top_level(text: str) -> dict[str, str]:
    """The keys of a YAML mapping whose values are text; no value is constructed, no tag obeyed.

    Raises:
        yaml.YAMLError: it is not YAML, or nested too deep.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"nested deeper than {_DEEPEST}")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else ()
    return {
        key.value: value.value
        for key, value in pairs
        if isinstance(key, yaml.ScalarNode)
        and isinstance(value, yaml.ScalarNode)
        and value.tag == _TEXT
    }
