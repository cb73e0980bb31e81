"""Replaces a recipe's data by one set of text, or by what the dense model says itself.

    evaluation   what `verify` measures perplexity on
    ranking      what a search judges its candidates by
    calibration  what methods and exporters look at
    healing      what is trained on

The text is split among them by documents, so that none of them sees what another has seen. Windows
and their lengths follow from how much there is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from prune_export.calibrate import (
    LONG_TOKEN,
    SUFFIXES,
    column_of,
    local_files,
    part_sizes,
    texts_of,
)
from prune_export.errors import PlanError
from prune_export.planning.data import sets_of
from prune_export.recipe import DENSE, Generated, LocalText, Recipe, Source, heal_of
from prune_export.recipe.sources import SOURCES, Part
from prune_export.system.files import shown

_SHARES: Final[Mapping[str, float]] = {
    "evaluation": 0.1,
    "ranking": 0.1,
    "calibration": 0.2,
    "healing": 0.6,
}
_MOST: Final[Mapping[str, int]] = {"evaluation": 64, "ranking": 64, "calibration": 128}
"""Windows taken where the recipe leaves their number open; healing takes all there are."""

_FEWEST: Final = 8
_SHORTEST: Final = 64
"""Windows and tokens in each, below which a part is too small to go by."""

_GOOD: Final = 32
"""Windows for which a short text gives up length."""

_OWN_SAMPLES: Final = 256
_OWN_LENGTH: Final = 512
_SAYS_ITSELF: Final = "generated"
"""The kind of data source that a model writes."""


@dataclass(frozen=True)
class _Use:
    """What a data source is for, by its name in the recipe."""

    name: str
    role: str
    source: Source


def with_text(
    recipe: Recipe, files: Sequence[Path], *, longest: int | None = None, seed: int = 0
) -> Recipe:
    """Gives a recipe that reads these files, or all text below these directories, for everything.

    `longest` is how many tokens the model's windows may have. The files are below the new recipe's
    root, so its model is no longer looked for there: who calls resolves it first.

    Raises:
        PlanError: there is no text, it cannot be read, or it is too little to be split.
    """
    found = _text_files(files)
    root = Path(os.path.commonpath([file.parent for file in found]))
    names = tuple(file.relative_to(root).as_posix() for file in found)
    column = column_of(found)
    uses = _uses(recipe)
    if not uses:
        return recipe
    parts = _parts([one.role for one in uses], seed)
    whole = LocalText(files=names, column=column)
    listed = local_files(whole, root)
    sizes = part_sizes(lambda: texts_of(listed, whole), parts)
    if any(size < LONG_TOKEN * _FEWEST * _SHORTEST for size in sizes):
        raise _too_little(found, uses, sizes)
    data = {
        one.name: _windows(one, LocalText(files=names, column=column, part=part), size, longest)
        for one, part, size in zip(uses, parts, sizes, strict=True)
    }
    return replace(recipe, data=data, root=root, model=None)


def with_own_samples(recipe: Recipe, *, longest: int | None = None) -> Recipe:
    """Gives a recipe that reads only what the dense model itself says, drawn anew for each use.

    Raises:
        PlanError: this version has no source that does so.
    """
    kind = SOURCES.get(_SAYS_ITSELF)
    if kind is None:
        raise PlanError(
            "--data",
            "is not given, and there is nothing to measure, calibrate or heal with",
            "pass text of the kind that the model is for: `--data notes.txt`",
        )
    data: dict[str, Any] = {}
    for seed, one in enumerate(_uses(recipe)):
        length = min(one.source.length, _OWN_LENGTH, longest or _OWN_LENGTH)
        body = {
            _SAYS_ITSELF: {
                "from": "dense",
                "prompts": "none",
                "new_tokens": max(1, min(_OWN_LENGTH, length) // 2),
                "seed": seed,
            },
            "samples": min(one.source.samples or _OWN_SAMPLES, _OWN_SAMPLES),
            "length": length,
            "packing": "stream" if one.role == "evaluation" else "packed",
        }
        data[one.name] = kind.model_validate(body)
    return replace(recipe, data=data)


def data_notes(recipe: Recipe) -> tuple[str, ...]:
    """Says how one text was split for a recipe, or that the model speaks for itself; else nothing.

    The sentences stand in the plan and in the card.
    """
    parts = {
        name: source.part
        for name, source in recipe.data.items()
        if isinstance(source, LocalText) and source.part
    }
    if parts:
        shares = ", ".join(f"{name} {part.stop - part.start:.0%}" for name, part in parts.items())
        seeds = {part.seed for part in parts.values()}
        return (
            f"The text is split by documents ({shares}; seed {', '.join(map(str, sorted(seeds)))})"
            ": what measures is not trained on.",
        )
    said = [
        name
        for name, source in recipe.data.items()
        if isinstance(source, Generated) and source.generated.speaker == DENSE
    ]
    if said:
        return (
            f"No text was given: {', '.join(said)} are what the dense model says itself, which "
            "shows how close the result is to it, not how good either is.",
        )
    return ()


def _text_files(given: Sequence[Path]) -> list[Path]:
    """The files that are named, and those below named directories that can be read as text.

    Raises:
        PlanError: one is not there, or a directory holds none.
    """
    found: dict[Path, None] = {}
    for path in given:
        where = f"--data  {shown(path)}"
        if path.is_dir():
            below = [one for one in sorted(path.rglob("*")) if one.name.endswith(SUFFIXES)]
            if not below:
                raise PlanError(
                    where,
                    f"is a directory without text, expected one of {', '.join(SUFFIXES)}",
                    "name a directory with text, or files",
                )
            found |= dict.fromkeys(Path(os.path.realpath(one)) for one in below)
        elif not path.exists():
            raise PlanError(where, "is not there", "check the path and the spelling")
        elif not path.name.endswith(SUFFIXES):
            raise PlanError(
                where,
                f"has another format, expected one of {', '.join(SUFFIXES)}",
                "save it as plain text (.txt)",
            )
        else:
            found[Path(os.path.realpath(path))] = None
    return list(found)


def _uses(recipe: Recipe) -> list[_Use]:
    """What a recipe's data sources are used for, those that judge first."""
    quality = recipe.verify.quality
    evaluation = quality.perplexity if quality else None
    ranking = {stage.data for stage in recipe.stages if stage.kind == "search"}
    stages = [heal_of(one.entry) if one.kind == "search" else one for one in recipe.stages]
    healing = {one.data for one in stages if one is not None and one.kind == "heal"}
    found = []
    for name, _ in sets_of(recipe):
        role = "calibration"
        if name == evaluation:
            role = "evaluation"
        elif name in ranking:
            role = "ranking"
        elif name in healing:
            role = "healing"
        found.append(_Use(name, role, recipe.data[name]))
    return found


def _parts(roles: Sequence[str], seed: int) -> list[Part]:
    total = sum(_SHARES[role] for role in roles)
    ends = [0.0]
    for role in roles:
        ends.append(round(ends[-1] + _SHARES[role] / total, 4))
    ends[-1] = 1.0
    return [Part(start=start, stop=stop, seed=seed) for start, stop in pairwise(ends)]


def _windows(use: _Use, source: LocalText, characters: int, longest: int | None) -> LocalText:
    """Chooses number and length of windows for a part of so many characters."""
    tokens = characters // LONG_TOKEN
    most = min(use.source.length, longest or use.source.length)
    length = max(_SHORTEST, min(most, tokens // _GOOD))
    samples: int | None = max(_FEWEST, tokens // length)
    asked = use.source.samples or _MOST.get(use.role)
    if asked is not None and samples is not None:
        samples = min(samples, asked)
    if use.role == "healing":
        # What it reads is decided by its steps.
        samples = use.source.samples and samples
    return source.model_copy(
        update={
            "samples": samples,
            "length": length,
            "seed": use.source.seed,
            "packing": "stream" if use.role == "evaluation" else "packed",
        }
    )


def _too_little(found: Sequence[Path], uses: Sequence[_Use], sizes: Sequence[int]) -> PlanError:
    total = sum(_SHARES[one.role] for one in uses)
    least = min(_SHARES[one.role] for one in uses) / total
    needed = LONG_TOKEN * _FEWEST * _SHORTEST / least
    named = shown(found[0].name) + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    roles = ", ".join(dict.fromkeys(one.role for one in uses))
    # Parts come in whole documents, so a little more than that is asked for.
    wanted = max(1.5 * needed, 1.5 * sum(sizes) if sum(sizes) > needed else 0.0)
    return PlanError(
        f"--data  {named}",
        f"holds {sum(sizes):,} characters of text, too few to be split into {roles}",
        f"give at least {round(wanted, -3):,.0f} characters (about {wanted / 6:,.0f} words), "
        "or more and shorter documents",
    )
