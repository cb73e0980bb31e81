"""Finds the stored tensors of a model directory: one safetensors file, or an index and its shards.

Shard files may be symbolic links (the Hub's cache is made of them), but names in an index must stay
inside the directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Final

from prune_export.checkpoint.config import read_json
from prune_export.checkpoint.header import Entry, read_header
from prune_export.errors import CheckpointError
from prune_export.system.files import is_regular

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5"})
"""Formats that can run code when they are opened, or are another framework's: never read."""

CONVERT: Final = (
    "convert it once where you trust it: `AutoModelForCausalLM.from_pretrained(SOURCE)"
    ".save_pretrained(TARGET)` with transformers writes safetensors"
)


def stored_entries(path: Path) -> dict[str, Entry]:
    """The stored tensors of a model directory, whatever they are.

    Raises:
        CheckpointError: there are none, or the files are broken or unsafe.
    """
    # transformers prefers the single file too, when both are there.
    if (path / SINGLE).exists():
        return read_header(path / SINGLE)
    if (path / INDEX).exists():
        return _sharded(path)
    names = sorted(found.name for found in path.iterdir())
    pickled = [name for name in names if Path(name.removesuffix(".index.json")).suffix in PICKLES]
    if pickled:
        raise CheckpointError(
            str(path / pickled[0]),
            "the weights are not safetensors; pickles can run code, so they are not opened",
            CONVERT,
        )
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    raise CheckpointError(
        str(path),
        f"has no weights: expected {SINGLE}, or {INDEX} with its shards"
        + (f"; got {some(others)}" if others else ""),
        "name the .gguf file itself as the model"
        if any(name.endswith(".gguf") for name in others)
        else "fetch the whole model, or save it with transformers (`save_pretrained`)",
    )


def _sharded(path: Path) -> dict[str, Entry]:
    index = path / INDEX
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            f"{index}  weight_map", f"got {listed!r:.60}, expected tensor names and their shards"
        )
    for name, shard in listed.items():
        _refuse_outside(index, name, shard)
    entries: dict[str, Entry] = {}
    for shard in sorted(set(listed.values())):
        if not is_regular(path / shard):
            raise CheckpointError(
                f"{index}  {shard}",
                "is a shard that does not exist, or is no regular file",
                f"fetch {shard} into {path}",
            )
        found = read_header(path / shard)
        for name, entry in found.items():
            if name in entries:
                raise CheckpointError(
                    f"{path / shard}  {name}",
                    f"is also in {entries[name].file.name}, expected each tensor in one shard",
                    "remove the shards that are of another model, or save the model again",
                )
            entries[name] = entry
    for name, shard in listed.items():
        if name not in entries or entries[name].file != path / shard:
            raise CheckpointError(
                f"{index}  {name}",
                f"should be in {shard}, which does not hold it",
                "the index and the shards are of different models: fetch both again",
            )
    unlisted = [name for name in entries if name not in listed]
    if unlisted:
        raise CheckpointError(
            f"{index}  {unlisted[0]}",
            f"is in {entries[unlisted[0]].file.name}, but not in the index "
            f"({len(unlisted)} such: {some(unlisted)})",
            "the index and the shards are of different models: fetch both again",
        )
    return entries


def _refuse_outside(index: Path, name: str, shard: object) -> None:
    if not isinstance(shard, str) or not shard:
        raise CheckpointError(f"{index}  {name}", f"got {shard!r:.60}, expected a file name")
    parts = PurePosixPath(shard)
    if parts.is_absolute() or ".." in parts.parts or "\\" in shard or "\0" in shard:
        raise CheckpointError(
            f"{index}  {name}",
            f"got {shard!r}, which points outside the directory",
            "do not use this model: a sound index names files beside it",
        )
    if parts.suffix in PICKLES:
        raise CheckpointError(
            f"{index}  {name}", f"got {shard!r}, which is not safetensors", CONVERT
        )


def some(names: Iterable[str], shown: int = 3) -> str:
    """Names the first ones, and that there are more."""
    listed = list(names)
    return ", ".join(listed[:shown]) + (", …" if len(listed) > shown else "")
