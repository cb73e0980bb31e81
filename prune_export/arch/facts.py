"""What a table says can be done with a family, in words, without a model."""

from __future__ import annotations

from typing import Any, Final

from prune_export.arch.conditions import keys_of
from prune_export.arch.roles import role
from prune_export.arch.table import Table

_CUTS: Final = {
    "mlp": "MLP width",
    "moe": "width of experts",
    "shared": "width of the shared expert",
    "expert": "number of experts",
    "kv": "heads",
    "residual": "hidden size",
}
"""Axes that methods cut."""


def cuts_of(table: Table) -> tuple[str, ...]:
    """The axes that a config of the family can say another size of."""
    written = set().union(*(keys_of(text) for text in table.config.writes.values()))
    used = {word for row in table.rows() for word in row.dims.replace("(", " ").replace(")", " ")
            .replace("+", " ").split()}  # fmt: skip
    says_heads = "dim" in written or "dim" not in table.axes
    return tuple(axis for axis in _CUTS if axis in written & used and (axis != "kv" or says_heads))


def facts_of(table: Table) -> dict[str, Any]:
    """Facts of a family: what is cut, made sparse, exported, and where that is known from."""
    sparse = [row.role for row in table.block if role(row.role).group]
    facts: dict[str, Any] = {
        "family": table.family,
        "model types": ", ".join(table.model_types),
        "class": ", ".join(table.architectures),
        "depth": _depth(table),
        "width": ", ".join(_CUTS[axis] for axis in cuts_of(table)) or "none",
        "sparse and quantized": ", ".join(dict.fromkeys(sparse)) or "none",
        "graphs (onnx, tensorrt, aoti)": _graphs(table),
        "source": table.source,
    }
    if table.derived is not None:
        facts["derived, proven"] = "; ".join(table.derived.proven)
        for what, why in table.derived.unproven.items():
            facts[f"refused: {what}"] = why
    if table.notes:
        facts["notes"] = table.notes
    return facts


def _depth(table: Table) -> str:
    needs = table.config.depth_requires
    if needs:
        said = ", ".join(f"{key} is {value!r}" for key, value in needs.items())
        return f"any blocks where {said}; else the last ones"
    if table.layer_sets:
        return "blocks of each kind, as far as the config can say what is left"
    return "any blocks"


def _graphs(table: Table) -> str:
    if table.untraceable:
        return f"refused: it {table.untraceable}"
    if any(row.role == "linear.conv" for row in table.block):
        return "onnx; the others refuse blocks that keep states of convolutions or recurrences"
    return "yes"
