"""Says in a plan, and in the card, what is done to the parts of a model that are not its text's."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from prune_export.arch import Arch
from prune_export.checkpoint import Checkpoint
from prune_export.contracts import Cost
from prune_export.recipe import Recipe
from prune_export.units import text_from_bytes

_WRITES: Final = ("import", "prune", "quantize", "heal", "report")
"""The steps that write a checkpoint."""


def wrapped_notes(recipe: Recipe, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Says which part of a model of images and text is cut and measured; nothing of a plain one.

    The sentences stand in the plan and in the card.
    """
    wrapped = checkpoint.wrapped
    if wrapped is None:
        return ()
    rest = "the rest"
    if wrapped.carried:
        rest = f"the other {len(wrapped.carried)} tensors"
        rest += f" ({text_from_bytes(wrapped.carried_bytes)})"
    notes = [
        f"This is a {wrapped.model_type} model, of images and text: its language model is cut, and "
        f"measured on text; {rest} come along as they are. "
        "Nothing here measures what it says of images."
    ]
    if wrapped.within.fed:
        notes.append(
            f"Features of the image are added after each of its first {wrapped.within.fed} blocks: "
            "no cut may remove one of these."
        )
    if recipe.export or any(stage.kind == "search" for stage in recipe.stages):
        notes.append("Engines hold the language model alone, and take no images.")
    return tuple(notes)


def with_rest(cost: Cost, kind: str, checkpoint: Checkpoint) -> Cost:
    """A step's cost with the bytes of the other parts, which come along into each checkpoint."""
    rest = checkpoint.wrapped.carried_bytes if checkpoint.wrapped else 0
    if kind not in _WRITES:
        return cost
    moved = cost.moved_bytes + 2 * rest
    return replace(cost, disk_bytes=cost.disk_bytes + rest, moved_bytes=moved)


def further_notes(checkpoint: Checkpoint, arch: Arch) -> tuple[str, ...]:
    """Says that modules which predict further tokens are left behind; nothing where there are none.

    The sentence stands in the plan and in the card.
    """
    lost = [entry for name, entry in checkpoint.entries.items() if name.startswith(arch.further)]
    if not lost:
        return ()
    size = text_from_bytes(sum(entry.nbytes for entry in lost))
    return (
        f"Its modules that predict further tokens (MTP, {len(lost)} tensors, {size}) are left "
        "behind: they were trained on hidden states that a cut changes, and transformers does not "
        "load them with the model.",
    )


def packed_notes(imported: str) -> tuple[str, ...]:
    """Says that packed weights were dequantized first; nothing of plain ones and of GGUF files.

    The sentence stands in the plan and in the card.
    """
    if imported not in ("fp8", "mxfp4"):
        return ()
    return (
        f"The base model's weights are {imported}: they are dequantized first, exactly, and the "
        "sizes and the dense model of this report are the dequantized one's. A checkpoint of "
        "plain floats takes two to four times the bytes of the packed one.",
    )
