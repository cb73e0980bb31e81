"""Finds what a run is asked to work on: its model, and the text that takes its recipe's place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prune_export.checkpoint import Checkpoint, gguf_config, packed_in, resolve_model
from prune_export.errors import PlanError
from prune_export.planning import with_own_samples, with_text
from prune_export.recipe import Recipe


def model_of(recipe: Recipe, model: str | None) -> tuple[str, Path, str | None]:
    """Resolves the model: its name, its path, its commit on the Hub.

    What the caller names may lie anywhere. What the recipe names is below its data root or on the
    Hub.

    Raises:
        PlanError: neither names one, or it is not there.
    """
    if model is not None:
        return model, *resolve_model(model)
    if not recipe.model:
        raise PlanError(recipe.name, "names no model", "pass `--model`, or write `model:`")
    return recipe.model, *resolve_model(recipe.model, below=recipe.root, asker=recipe.name)


def config_of(path: Path) -> Checkpoint:
    """Opens a model directory, of which a config.json will do, or the config of a model that is
    to be dequantized first: a GGUF file, or a directory with packed weights.
    """
    if path.suffix == ".gguf":
        return Checkpoint(path, gguf_config(path), {})
    if (packed := packed_in(path)) is not None:
        return packed.alone()
    weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return Checkpoint.open(path, weights=weights)


def imported_from(path: Path) -> str:
    """What a model is dequantized from before anything else: `gguf`, `fp8`, `mxfp4`; else empty."""
    if path.suffix == ".gguf":
        return "gguf"
    packed = packed_in(path)
    return packed.method if packed else ""


def with_data(
    recipe: Recipe, model: str | None, files: Sequence[Path], *, own: bool = False
) -> tuple[Recipe, str | None]:
    """Gives a recipe that reads one set of text for everything, and the model to run it with.

    Without `files` the recipe is left as it is, or, if `own`, reads what the dense model says.

    Raises:
        PlanError: the model is not there, or the text is too little or no text.
    """
    if not files and not own:
        return recipe, model
    spec, path, revision = model_of(recipe, model)
    longest = _positions(config_of(path).config)
    if not files:
        return with_own_samples(recipe, longest=longest), model
    # The recipe's own root is given up for that of the text, so its model is named in full.
    named = spec if model is not None or revision else str(path)
    return with_text(recipe, files, longest=longest), named


def _positions(config: Mapping[str, Any]) -> int | None:
    found = [
        value
        for key in ("max_position_embeddings", "n_positions")
        if isinstance(value := config.get(key), int) and value > 0
    ]
    return min(found, default=None)
