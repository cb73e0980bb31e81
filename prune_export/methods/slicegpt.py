"""Rotates the residual states to their principal directions and cuts the least of them off.

A norm that divides by the root mean square does not see a rotation, so the whole model can be
rotated without changing what it computes; then most of the squares lie in the first directions, and
hidden size shrinks everywhere at once. One rotation for all places leaves a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import sqrt
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import Further, Grams, JunctionGrams, ModelView, Statistic
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.methods import _rotation
from prune_export.surgery import Edit, Keep, Overwrite, Untie


@dataclass(frozen=True)
class SliceGPT:
    """Rotate the residual states by their principal directions and keep the first of them.

    Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
    Columns", arXiv:2401.15024, section 3.
    Differs: one rotation for all places where the states are read, so no shortcut matrices are
    needed and stock classes load the result; each state counts the same for the directions,
    whatever its length; the matrices are refitted to the states that are left (`refit`). Tied
    embeddings come apart, as the last norm's gain goes into the head. Only for models with RMS
    norms before attention and MLP and none after.
    """

    VERSION: ClassVar[str] = "1"

    sparsity: Annotated[
        float,
        Field(ge=0, lt=1, description="Fraction of the hidden size to remove; 0 only rotates."),
    ]
    multiple_of: Annotated[
        int, Field(ge=1, description="The hidden size left is a multiple of this.")
    ] = 8
    refit: Annotated[
        bool,
        Field(description="Fit each matrix by least squares to what is left of its own inputs."),
    ] = True

    def statistics(self, arch: Arch) -> tuple[Statistic | Further, ...]:
        held = JunctionGrams.ram_bytes(arch)
        return (JunctionGrams(), Further(forwards=0, samples=1, ram_bytes=held))

    def predict(self, arch: Arch) -> Arch:
        _rotation.check(arch)
        for tied in _tied(arch):
            arch = arch.with_own(tied.name)
        return arch.resized("residual", self.size(arch))

    def size(self, arch: Arch) -> int:
        """The hidden size that is left: the nearest that the model's config can say.

        Raises:
            PlanError: it can say none.
        """
        hidden = arch.sizes["residual"]
        if not self.sparsity:
            return hidden
        able = _rotation.sizes(arch, self.multiple_of)
        if not able:
            others = _rotation.sizes(arch, 1)
            wanted = (1 - self.sparsity) * hidden
            near = sorted(sorted(others, key=lambda size: abs(size - wanted))[:3])
            raise PlanError(
                f"multiple_of: {self.multiple_of}",
                f"no hidden size below {hidden} is one that a {arch.family} config can say",
                "hidden sizes near to what is asked are "
                f"{', '.join(map(str, near))}: write a `multiple_of` that divides one of them"
                if near
                else "choose another method",
            )
        wanted = (1 - self.sparsity) * hidden
        return min(able, key=lambda size: (abs(size - wanted), -size))

    def decide(self, model: ModelView) -> Decision:
        arch = model.arch
        after = self.predict(arch)
        hidden, kept = arch.sizes["residual"], after.sizes["residual"]
        grams: Grams = model.stat(JunctionGrams())
        basis = _rotation.principal(grams[i] for i in range(len(grams)))[:, :kept]
        energy = [float((basis * (grams[i] @ basis)).sum()) for i in range(len(grams))]
        edits = _Slicing(model, grams, basis, self.refit)
        untied = [tensor.name for tensor in _tied(arch)]
        log = {
            "hidden": [hidden, kept],
            "kept_energy": energy,
            "untied": untied,
            "parameters": [arch.parameters(), after.parameters()],
        }
        if after.parameters() >= arch.parameters():
            log["note"] = (
                "the embeddings come apart, so the checkpoint is no smaller; "
                "the work for each token is"
            )
        return Decision((*map(Untie, untied), *edits), log)


def _tied(arch: Arch) -> list[Tensor]:
    """The tied tensors that read the states: not what the embedding is any more."""
    return [tensor for tensor in arch.using("residual") if tensor.tied_to is not None]


class _Slicing:
    """The edits: every tensor that touches the residual states in the new basis."""

    def __init__(self, model: ModelView, grams: Grams, basis: torch.Tensor, refit: bool) -> None:
        self._model, self._grams, self._basis, self._refit = model, grams, basis, refit
        self._gains = {
            (tensor.layer, tensor.role): tensor
            for tensor in model.arch.using("residual")
            if tensor.role in _rotation.NORMS
        }
        # The matrices of one junction are written one after the other.
        self._reading = lru_cache(maxsize=2)(self._reading_at)

    def __iter__(self) -> Iterator[Edit]:
        arch = self._model.arch
        hidden, kept = arch.sizes["residual"], self._basis.shape[1]
        if kept < hidden:
            yield Keep("residual", tuple(range(kept)))
        for tensor in arch.using("residual"):
            if tensor.role in _rotation.NORMS:
                yield Overwrite(tensor.name, partial(self._norm, tensor, sqrt(hidden / kept)))
            elif tensor.role in _rotation.READS_BEHIND:
                yield Overwrite(tensor.name, partial(self._reader, tensor))
            else:
                yield Overwrite(tensor.name, partial(self._writer, tensor))

    def _norm(self, tensor: Tensor, gain: float) -> torch.Tensor:
        """The old gain is in the matrices; a constant undoes the mean over fewer squares."""
        return torch.full_like(self._model.checkpoint.read(tensor.name), gain)

    def _reader(self, tensor: Tensor) -> torch.Tensor:
        norm = _rotation.READS_BEHIND[tensor.role]
        gain = self._model.checkpoint.read(self._gains[tensor.layer, norm].name)
        by = self._reading(self._junction(tensor.layer, norm))
        stored = self._model.checkpoint.read(tensor.tied_to or tensor.name)
        return _rotation.turned(stored, _rotation.along(tensor), by, gain)

    def _writer(self, tensor: Tensor) -> torch.Tensor:
        stored = self._model.checkpoint.read(tensor.name)
        return _rotation.turned(stored, _rotation.along(tensor), self._basis)

    def _junction(self, layer: int | None, norm: str) -> int:
        if layer is None:
            return len(self._grams) - 1
        return 2 * layer + (norm == "norm.mlp")

    def _reading_at(self, junction: int) -> torch.Tensor:
        if not self._refit:
            return self._basis
        return _rotation.fitted(self._grams[junction], self._basis)
