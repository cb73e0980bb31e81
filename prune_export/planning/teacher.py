"""The teacher of a heal stage: found, and seen to have the student's vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint, gguf_config, packed_in, resolve_model
from prune_export.contracts import Taught
from prune_export.errors import PlanError
from prune_export.recipe import Recipe
from prune_export.system.files import is_regular, read_json_object

_WHERE: Final = "objective.distill.teacher"
_TOKENIZER: Final = "tokenizer.json"


def teacher_of(
    recipe: Recipe, healer: Any, model: Checkpoint, dense: Arch, ignore_keys: Collection[str] = ()
) -> Arch | None:
    """The shapes of the model that a healer learns from; None where it learns from none.

    `model` is what the recipe starts from, of the shapes `dense`.

    Raises:
        PlanError: there is no such model, or it has another vocabulary.
    """
    if not isinstance(healer, Taught) or not healer.taught:
        return None
    if healer.teacher is None:
        return dense
    path, _ = resolve_model(healer.teacher, below=recipe.root, asker=recipe.name)
    if path.suffix == ".gguf":
        other = Checkpoint(path, gguf_config(path), {})
    else:
        packed = packed_in(path)
        other = packed.alone() if packed else Checkpoint.open(path)
    refuse_other_vocabulary(other, model, ignore_keys)
    return other.arch(ignore_keys)


def refuse_other_vocabulary(
    teacher: Checkpoint, student: Checkpoint, ignore_keys: Collection[str] = ()
) -> None:
    """Refuses a teacher whose tokens are not the student's.

    Tokenizer files that differ may still number the same tokens: then their vocabularies are
    compared. Of a model that is still a GGUF file only the number of tokens is known.

    Raises:
        PlanError: they are not.
    """
    fix = (
        "name a teacher of the same family, or leave it out: the model that the recipe starts from"
    )
    sizes = [one.arch(ignore_keys).sizes["vocab"] for one in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise PlanError(
            _WHERE,
            f"predicts {sizes[0]:,} tokens and the student {sizes[1]:,}, expected the same",
            fix,
        )
    files = [one.path / _TOKENIZER for one in (teacher, student) if one.path.is_dir()]
    if len(files) < 2 or not all(is_regular(file) for file in files):
        return
    for one in (teacher, student):
        one.side_files()  # refuses what is far too long
    if files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (_numbered(file) for file in files)
    if ours != theirs:
        count = len(set(ours.items()) ^ set(theirs.items()))
        raise PlanError(
            _WHERE,
            f"has another tokenizer than the student: {count:,} tokens or numbers differ",
            fix,
        )


def _numbered(file: Path) -> dict[str, str]:
    """The tokens of a tokenizer.json with their numbers, and how it joins them."""
    known = read_json_object(file, "a tokenizer")
    model = known.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbered: dict[str, str] = {}
    if isinstance(vocabulary, dict):
        numbered = {str(token): str(number) for token, number in vocabulary.items()}
    elif isinstance(vocabulary, list):
        numbered = {str(row): str(number) for number, row in enumerate(vocabulary)}
    for row in known.get("added_tokens") or ():
        if isinstance(row, dict):
            numbered[str(row.get("content"))] = str(row.get("id"))
    return numbered
