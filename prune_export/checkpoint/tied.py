"""Reads tensors under other names, and checks LM heads that a config ties to the embedding.

Of the latter:

transformers 5 takes what is there: two tensors of other values stay apart, whatever config.json
says, and of a pair of which only the head is stored the embedding is made. The first is refused
here, as every tool would read config.json its own way; the second is one tensor under either name.

Source: transformers, `PreTrainedModel.tie_weights`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.arch.conditions import holds
from prune_export.arch.table import Table
from prune_export.checkpoint.config import full_config
from prune_export.checkpoint.header import Entry
from prune_export.errors import CheckpointError

_CHUNK_BYTES: Final = 1 << 24


def with_one_name(
    entries: dict[str, Entry], table: Table, config: Mapping[str, Any], path: Path
) -> dict[str, Entry]:
    """Renames a tied head that is stored without its embedding to the embedding.

    Raises:
        UnsupportedArch: as `full_config`.
        CheckpointError: as `full_config`.
    """
    alone = {
        row.name: row.tied_to
        for row in table.rows()
        if row.tied_to and row.tied_to not in entries and row.name in entries
    }
    if not alone:
        return entries
    full = full_config(config, path)
    named = {
        row.name: row.tied_to
        for row in table.rows()
        if row.name in alone and holds(row.when, full) and holds(row.tied_when, full)
    }
    return {named.get(name) or name: entry for name, entry in entries.items()}


def with_prefix(entries: dict[str, Entry], table: Table) -> dict[str, Entry]:
    """Adds the base model's prefix to names, which some old checkpoints lack.

    GPT-2 on the Hub, for one, stores `h.0.…` for `transformer.h.0.…`.
    """
    prefix, dot, rest = table.on_disk.partition(".")
    if not dot or any(name.startswith(f"{prefix}.") for name in entries):
        return entries
    if not any(name.startswith(f"{rest}.") for name in entries):
        return entries
    whole = {row.name for row in (*table.head, *table.tail)}
    return {name if name in whole else f"{prefix}.{name}": entry for name, entry in entries.items()}


def refuse_two_heads(entries: Mapping[str, Entry], arch: Arch, path: Path) -> None:
    """Refuses a tensor that is tied to another, and stored with other values than that.

    Raises:
        CheckpointError: naming it, and what to write into config.json.
    """
    for tensor in arch.tensors:
        if tensor.tied_to is None or tensor.name not in entries:
            continue
        if not _are_equal(entries[tensor.name], entries[tensor.tied_to]):
            raise CheckpointError(
                f"{path}  {tensor.name}",
                f"differs from {tensor.tied_to}, to which config.json ties it",
                'write `"tie_word_embeddings": false` into config.json, as transformers keeps '
                "both; where the head is a leftover, save the model without it",
            )


def _are_equal(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same bytes; read to the first difference, and only once."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _equal(one, other, _stamp(one.file), _stamp(other.file))


@lru_cache(maxsize=64)
def _equal(one: Entry, other: Entry, *stamps: tuple[int, int]) -> bool:
    del stamps  # a file that has changed is another
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        for done in range(0, one.nbytes, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, one.nbytes - done)
            if first.read(size) != second.read(size):
                return False
    return True


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size
