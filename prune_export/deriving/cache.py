"""Derives a table when a model needs one, keeps it in the store, and says what was proven."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from prune_export.arch import outside
from prune_export.arch.table import Table, common, parse_table, tables
from prune_export.checkpoint import Checkpoint
from prune_export.deriving.writing import text_of
from prune_export.errors import UnsupportedArch
from prune_export.store import Artifact, Key, Store

VERSION: Final = "1"
"""Raised when derivation finds other tables, or proves more."""


def ensure_family(checkpoint: Checkpoint, store: Path) -> bool:
    """Derives and proves a table for a checkpoint of a type that has none; says whether it did.

    The table is kept in the store, by the config and the version of transformers, and this process
    and those that it starts know it from then on.

    Raises:
        UnsupportedArch: no table can be derived, or what must be proven is disproved.
        CheckpointError: the config is broken.
    """
    model_type = str(checkpoint.config.get("model_type"))
    if model_type in tables() and tables()[model_type].derived is None:
        return False
    full = checkpoint.full_config()
    _refuse_quantized(full)
    made = Store(store).make(_key(full), lambda files, _: _built(full, files))
    outside.use(made.path)
    return True


def kept_family(full: Mapping[str, Any], store: Path) -> Artifact | None:
    """The artifact of a table that was derived for this config; None where there is none."""
    return Store(store).get(_key(full).id) if store.is_dir() else None


def _key(full: Mapping[str, Any]) -> Key:
    # What never changes what a decoder computes changes no table.
    same = common()
    decisive = {key: value for key, value in full.items() if key not in same.known}
    from importlib.metadata import version

    parameters = {"config": decisive, "transformers": version("transformers")}
    return Key("family", str(full["model_type"]), VERSION, parameters)


def _refuse_quantized(full: Mapping[str, Any]) -> None:
    for key, advice in common().refuses.items():
        if full.get(key):
            raise UnsupportedArch(f"config.json  {key}", "is set, expected none", advice)


def _built(full: Mapping[str, Any], files: Path) -> dict[str, Any]:
    # Imported here: most models have a table, and this brings torch and transformers.
    from prune_export.deriving.making import derive

    found = derive(full)
    model_type = full["model_type"]
    if found.failed:
        first = found.failed[0]
        more = f" ({len(found.failed)} checks do not hold)" if len(found.failed) > 1 else ""
        raise UnsupportedArch(
            "config.json  model_type",
            f"{model_type!r} has no table, and the one derived for it is disproved{more}: "
            f"{first.what}: {first.found}",
            f"write it with `prune-export families derive MODEL -o DIR/{model_type}.yaml`, mend "
            f"it, prove it with `families prove DIR/{model_type}.yaml`, and pass `--families DIR`",
        )
    files.mkdir(parents=True, exist_ok=True)
    name = f"{model_type}.yaml"
    (files / name).write_text(text_of(found.table), encoding="utf-8")
    parse_table((files / name).read_text(encoding="utf-8"), name)
    return {
        "model_type": model_type,
        "seconds": round(found.seconds, 2),
        "checks": [[one.what, one.word, one.found] for one in found.checks],
    }


def derived_note(table: Table) -> str:
    """One sentence on a derived table, for plans and cards; "" for one that a person wrote."""
    if table.derived is None:
        return ""
    names = [one.partition(" (")[0] for one in table.derived.proven]
    lost = "; ".join(f"{what}: {why}" for what, why in table.derived.unproven.items())
    return (
        f"No table is written for {table.family}: one was derived from transformers "
        f"{table.derived.transformers} and proven on a random model of this config, shrunk: "
        f"{', '.join(names)}." + (f" Not proven, and refused: {lost}." if lost else "")
    )


__all__ = ["VERSION", "derived_note", "ensure_family", "kept_family"]
