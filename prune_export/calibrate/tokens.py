"""A set of token windows, what it was made from, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class TokenSet:
    """Token windows: `ids` int64 `[samples, length]`, and where they came from.

    `fingerprint` is a sha256 of ids and provenance; `documents` are hashes of the source documents,
    in the order of their first use, by which overlap between two sets is found.
    """

    ids: torch.Tensor
    fingerprint: str
    documents: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
