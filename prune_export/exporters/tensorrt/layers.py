"""Parses an engine inspector's JSON: layer names and the kernels that run them.

The JSON has `Layers` in every version; beside it 8.x and 10.x have `Bindings`, 11.x `I/O Tensors`.
`HasSparseWeights` says that a layer's weights have the pattern, which is no proof of anything: the
kernel's own name is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from prune_export.errors import StageError

_SPARSE: Final = re.compile(r"sparse|sptensor", re.IGNORECASE)
_TACTIC: Final = ("TacticName", "Tactic Name", "tactic_name")


@dataclass(frozen=True)
class Layer:
    """A layer of an engine; `tactic` is its kernel's name, empty where the engine does not tell."""

    name: str
    kind: str
    tactic: str

    @property
    def sparse(self) -> bool:
        """Whether its kernel is one for sparse weights."""
        return bool(_SPARSE.search(self.tactic))


def layers_of(information: str) -> tuple[Layer, ...]:
    """Parses the layers in an inspector's JSON.

    Raises:
        StageError: it is not the JSON of an inspector.
    """
    try:
        found = json.loads(information)
        listed = found["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(
            "tensorrt: layer information",
            f"the inspector's answer has no layers: {information[:200]!r}",
            "report this with the version of the library",
        ) from error
    return tuple(_layer(entry) for entry in listed)


def sparse_tactics(layers: Iterable[Layer]) -> Mapping[str, str]:
    """Finds the kernels for sparse weights, by layer."""
    return {layer.name: layer.tactic for layer in layers if layer.sparse}


def _layer(entry: Any) -> Layer:
    if isinstance(entry, str):  # an engine that was built to tell names only
        return Layer(entry, "", "")
    tactic = next((str(entry[key]) for key in _TACTIC if entry.get(key)), "")
    return Layer(str(entry.get("Name", "")), str(entry.get("LayerType", "")), tactic)
