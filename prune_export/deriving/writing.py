"""Writes a table as YAML that a person can read and mend, a line a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from prune_export.arch.table import Table


def text_of(table: Table) -> str:
    """The YAML of a table, as the files of ours look; what is at its default is left out."""
    said = table.model_dump(mode="json", exclude_defaults=True)
    lines: list[str] = []
    for key, value in said.items():
        if key in ("head", "block", "tail"):
            lines += (
                [f"{key}:", *(f"  - {_flow(row)}" for row in value)] if value else [f"{key}: []"]
            )
        elif key in ("axes", "layer_sets", "config", "tiny", "derived"):
            lines.append(f"{key}:")
            lines += [f"  {name}: {_flow(one)}" for name, one in value.items()]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    plain = dict(value) if isinstance(value, Mapping) else value
    text = yaml.safe_dump(
        plain, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return text.removesuffix("\n...\n").strip()
