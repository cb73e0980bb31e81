"""Tells a store from any other directory, by its mark.

    <store>/.prune-export-store     the mark, written when a store is made

Stores of before had no mark. One is recognised by having only what a store has; then it is marked.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Final

from prune_export.errors import PlanError
from prune_export.system.locking import write_atomically
from prune_export.system.places import judging, named

MARK: Final = ".prune-export-store"
VERSION: Final = 1

ARTIFACT: Final = re.compile(r"[a-z]+-.+-[0-9a-f]{24}", re.DOTALL)
"""The name of an artifact's directory: kind, name, hash."""

_OURS: Final = re.compile(
    rf"{ARTIFACT.pattern}(?:\.old)?(?:\.partial)?"
    rf"|{ARTIFACT.pattern}\.lock"
    r"|roots|seen\.json|\.prune-export-store"
    r"|\.seen\.json\.\d+|\.\.prune-export-store\.\d+"  # a killed writer's
    r"|\.nfs[0-9a-f]+|\.DS_Store",
    re.DOTALL,
)
_NEITHER: Final = frozenset({"lost+found"})
"""What a file system has of its own accord, where the store is the root of one."""


def is_artifact(name: str) -> bool:
    """Whether a directory of this name in a store is an artifact, or one that is being built."""
    return ARTIFACT.fullmatch(name.removesuffix(".partial").removesuffix(".old")) is not None


def refuse_foreign_store(root: Path, option: str = "--store") -> None:
    """Refuses a directory that is neither absent, nor empty, nor a store; nothing is written.

    Raises:
        PlanError: it is another's, or a later version's, or cannot be read or written.
    """
    with judging(root, option) as (where, real):
        found = sorted(set(os.listdir(real)) - _NEITHER) if real.is_dir() else []
        if MARK in found:
            _refuse_other_version(real, where, option)
            return
        foreign = [name for name in found if not _OURS.fullmatch(name)]
        if foreign:
            raise PlanError(
                where,
                f"is no store: it has no mark ({MARK}), and holds {named(foreign)}",
                f"give another `{option}`: one that a run has made, or one that is not there yet",
            )


def is_store(root: Path) -> bool:
    """Whether a directory that was not refused is a store already, and not absent or empty."""
    return root.is_dir() and bool(set(os.listdir(root)) - _NEITHER)


def leave_mark(root: Path) -> None:
    """Marks a store that was not refused."""
    if not (root / MARK).is_file():
        write_atomically(root / MARK, json.dumps({"store": VERSION}) + "\n")


def _refuse_other_version(root: Path, where: str, option: str) -> None:
    mark = root / MARK
    try:
        said = None
        if mark.is_file() and not mark.is_symlink():  # a pipe would keep us waiting
            with mark.open("rb") as stream:
                said = json.loads(stream.read(1000))
    except (OSError, ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("store") != VERSION:
        raise PlanError(
            where,
            f"has a mark that this version does not understand ({MARK})",
            f"give another `{option}`, or use the version of prune_export that made it",
        )
