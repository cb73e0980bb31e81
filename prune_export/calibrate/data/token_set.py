"""A set of token windows with its fingerprint and provenance, and the file it is saved in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import torch

from prune_export.errors import CheckpointError
from prune_export.system.files import open_regular

_KEY: Final = "prune_export.tokens"
_COUNTED: Final = "counted"
_VERSION: Final = 1


@dataclass(frozen=True)
class TokenSet:
    """Token windows: `ids` int64 `[samples, length]`, and where they came from.

    Every window is full: nothing is padded. `counted` bool of the same shape says which tokens,
    being predicted, count in a loss, one at least in each window; None where all do. `fingerprint`
    is a sha256 of all these; `documents` are hashes of the source documents, in the order of their
    first use, by which overlap between two sets is found. `provenance` is JSON and never holds a
    path of this machine.
    """

    ids: torch.Tensor
    fingerprint: str
    documents: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    counted: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        documents: tuple[str, ...] = (),
        provenance: Mapping[str, Any] | None = None,
        counted: torch.Tensor | None = None,
    ) -> Self:
        """Makes a set of these windows, with its fingerprint."""
        ids = ids.to(torch.int64).contiguous()
        counted = None if counted is None else counted.to(torch.bool).contiguous()
        known = dict(provenance or {})
        return cls(ids, _fingerprint(ids, known, counted), documents, known, counted)

    @property
    def samples(self) -> int:
        """The number of windows."""
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return int(self.ids.shape[1])

    def save(self, path: Path) -> None:
        """Writes one safetensors file; the same set gives the same bytes."""
        from safetensors.torch import save_file

        known = {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "documents": list(self.documents),
            "provenance": dict(self.provenance),
        }
        # One key: safetensors writes several metadata keys in an arbitrary order.
        tensors = {"ids": self.ids}
        if self.counted is not None:
            tensors[_COUNTED] = self.counted
        save_file(tensors, path, metadata={_KEY: json.dumps(known, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is not a token set, or was changed.
        """
        from safetensors import SafetensorError, safe_open

        fix = "write it again with this tool (`TokenSet.save`)"
        open_regular(path, None, "a token set").close()
        try:
            with safe_open(path, framework="pt") as file:
                known = json.loads((file.metadata() or {})[_KEY])
                ids = file.get_tensor("ids")
                counted = file.get_tensor(_COUNTED) if _COUNTED in file.keys() else None  # noqa: SIM118
            fingerprint = str(known["fingerprint"])
            documents = tuple(str(one) for one in known["documents"])
            provenance = dict(known["provenance"])
        except (
            OSError,
            SafetensorError,
            KeyError,
            TypeError,
            ValueError,
            RecursionError,
            OverflowError,
        ) as error:
            raise CheckpointError(str(path), f"is not a token set: {error}", fix) from None
        if (
            ids.dtype != torch.int64
            or ids.dim() != 2
            or (counted is not None and _unfit(counted, ids))
            or fingerprint != _fingerprint(ids, provenance, counted)
        ):
            raise CheckpointError(
                str(path), "holds other tokens than its fingerprint says: it was changed", fix
            )
        if ids.numel() and int(ids.min()) < 0:
            raise CheckpointError(str(path), f"holds the token id {int(ids.min())}", fix)
        return cls(ids, fingerprint, documents, provenance, counted)


def _unfit(counted: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the loss flags have another shape than the windows, or leave one without a loss."""
    if counted.dtype != torch.bool or counted.shape != ids.shape:
        return True
    return not bool(counted[:, 1:].any(dim=1).all())


def _fingerprint(
    ids: torch.Tensor, provenance: Mapping[str, Any], counted: torch.Tensor | None
) -> str:
    digest = hashlib.sha256(json.dumps([list(ids.shape), provenance], sort_keys=True).encode())
    digest.update(ids.contiguous().numpy().data)
    if counted is not None:
        digest.update(counted.contiguous().numpy().data)
    return digest.hexdigest()
