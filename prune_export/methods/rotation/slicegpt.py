"""Rotates the residual stream to its principal directions and cuts off the least (SliceGPT).

A norm that divides by the root mean square does not see a rotation, so the whole model can be
rotated without changing what it computes; then most of the squares lie in the first directions, and
hidden size shrinks everywhere at once. One rotation for all places leaves a stock checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.arch.roles import role
from prune_export.calibrate import Covariances, ExtraPass, ModelView, NormInputCovariance, Statistic
from prune_export.checkpoint.header import TORCH
from prune_export.contracts import Decision
from prune_export.errors import PlanError
from prune_export.pruning.rotation import residual_bases
from prune_export.surgery import Become, Edit, Keep, Overwrite, Untie


@dataclass(frozen=True)
class SliceGPT:
    """Rotate the residual stream to its principal directions (PCA) and keep the first of them.

    Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
    Columns", arXiv:2401.15024, section 3.
    Differs: by default one rotation for all places where the states are read, so no shortcut
    matrices are needed and stock classes load the result; each state counts the same for the
    directions, whatever its length; matrices are refitted to the states that are left (`refit`).
    Tied embeddings come apart, as the last norm's gain goes into the head. Only for models with RMS
    norms before attention and MLP and none after; `per_junction` for llama, mistral, qwen2, qwen3.
    """

    VERSION: ClassVar[str] = "1"

    sparsity: Annotated[
        float,
        Field(ge=0, lt=1, description="Fraction of the hidden size to remove; 0 only rotates."),
    ]
    rotation: Annotated[
        Literal["shared", "per_junction"],
        Field(
            description="One for all places, for stock classes; or the paper's, one before each "
            "norm: two more matrices a block, and a model type of ours, whose code comes along."
        ),
    ] = "shared"
    multiple_of: Annotated[
        int, Field(ge=1, description="The hidden size left is a multiple of this.")
    ] = 8
    refit: Annotated[
        bool,
        Field(description="Fit each matrix by least squares to what is left of its own inputs."),
    ] = True

    def statistics(self, arch: Arch) -> tuple[Statistic | ExtraPass, ...]:
        held = NormInputCovariance.ram_bytes(arch)
        return (NormInputCovariance(), ExtraPass(forwards=0, samples=1, ram_bytes=held))

    def predict(self, arch: Arch) -> Arch:
        residual_bases.check(arch)
        size = self.size(arch)
        for tied in _tied(arch):
            arch = arch.with_own(tied.name)
        if self.rotation == "per_junction":
            arch = arch.become(residual_bases.sliced_type(arch))
        return arch.resized("residual", size)

    def size(self, arch: Arch) -> int:
        """The hidden size that is left: the nearest that the model's config can express.

        Raises:
            PlanError: it can express none.
        """
        hidden = arch.sizes["residual"]
        if not self.sparsity:
            return hidden
        able = residual_bases.sizes(arch, self.multiple_of)
        if not able:
            others = residual_bases.sizes(arch, 1)
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
        covariances: Covariances = model.stat(NormInputCovariance())
        numbers = range(len(covariances))
        if self.rotation == "shared":
            shared = residual_bases.principal(covariances[i] for i in numbers)[:, :kept]
            bases = [shared] * len(covariances)
        else:
            bases = [residual_bases.principal([covariances[i]])[:, :kept] for i in numbers]
        energy = [float((bases[i] * (covariances[i] @ bases[i])).sum()) for i in numbers]
        edits: list[Edit] = [Untie(tensor.name) for tensor in _tied(arch)]
        if self.rotation == "per_junction":
            edits.append(Become(str(after.config["model_type"])))
        edits += _Slicing(model, after, covariances, bases, self.refit)
        log = {
            "hidden": [hidden, kept],
            "kept_energy": energy,
            "untied": [tensor.name for tensor in _tied(arch)],
            "parameters": [arch.parameters(), after.parameters()],
        }
        if after.parameters() >= arch.parameters():
            log["note"] = (
                "what is added outweighs what is cut: only the work for a token may shrink"
            )
        return Decision(tuple(edits), log)


def _tied(arch: Arch) -> list[Tensor]:
    """The tied tensors that read the residual stream, which now differ from the embedding."""
    return [tensor for tensor in arch.using("residual") if tensor.tied_to is not None]


class _Slicing:
    """Makes the edits: every tensor that reads or writes the residual stream, in its new basis.

    There is a basis for each norm, numbered as in `Covariances`: what reads behind a norm reads in
    its basis, and what writes does so in the basis of the next norm.
    """

    def __init__(
        self,
        model: ModelView,
        after: Arch,
        covariances: Covariances,
        bases: Sequence[torch.Tensor],
        refit: bool,
    ) -> None:
        self._model, self._after = model, after
        self._covariances, self._bases, self._refit = covariances, bases, refit
        self._gains = {
            (tensor.layer, tensor.role): tensor
            for tensor in model.arch.using("residual")
            if tensor.role in residual_bases.NORMS
        }
        # The matrices behind one norm are written one after the other.
        self._reading = lru_cache(maxsize=2)(self._reading_at)

    def __iter__(self) -> Iterator[Edit]:
        hidden, kept = self._bases[0].shape
        if kept < hidden:
            yield Keep("residual", tuple(range(kept)))
        for tensor in self._after.using("residual"):
            if tensor.role in residual_bases.NORMS:
                yield Overwrite(tensor.name, partial(self._norm, tensor, sqrt(hidden / kept)))
            elif tensor.role in residual_bases.READS_BEHIND:
                yield Overwrite(tensor.name, partial(self._reader, tensor))
            elif tensor.role in residual_bases.TURNS:
                yield Overwrite(tensor.name, partial(self._shortcut, tensor))
            else:
                yield Overwrite(tensor.name, partial(self._writer, tensor))

    def _norm(self, tensor: Tensor, gain: float) -> torch.Tensor:
        """The new gain of a norm: a constant, which undoes the mean over fewer squares.

        The old gain has gone into the matrices behind it.
        """
        return torch.full_like(self._stored(tensor), gain)

    def _reader(self, tensor: Tensor) -> torch.Tensor:
        norm = residual_bases.READS_BEHIND[tensor.role]
        gain = self._stored(self._gains[tensor.layer, norm])
        by = self._reading(self._junction(tensor.layer, norm))
        return residual_bases.turned(self._stored(tensor), residual_bases.along(tensor), by, gain)

    def _writer(self, tensor: Tensor) -> torch.Tensor:
        basis = self._bases[self._next(tensor)]
        return residual_bases.turned(self._stored(tensor), residual_bases.along(tensor), basis)

    def _shortcut(self, tensor: Tensor) -> torch.Tensor:
        """The change from the basis of one norm to that of the next, as a matrix `[out, in]`."""
        number = self._next(tensor)
        before, after = self._bases[number - 1], self._bases[number]
        hidden, kept = before.shape
        found = torch.zeros(hidden, hidden)
        found[:kept, :kept] = (after.T @ before).float()
        return found.to(self._dtype())

    def _stored(self, tensor: Tensor) -> torch.Tensor:
        known = self._model.arch.by_name[tensor.name]
        return self._model.checkpoint.read_finite(known.tied_to or known.name)

    def _dtype(self) -> torch.dtype:
        """The dtype that surgery stores a new tensor in: that of the first one."""
        first = next(iter(self._model.checkpoint.entries.values()))
        found: torch.dtype = getattr(torch, TORCH[first.dtype])
        return found

    def _junction(self, layer: int | None, norm: str) -> int:
        if layer is None:
            return len(self._bases) - 1
        return 2 * layer + (norm == "norm.mlp")

    def _next(self, tensor: Tensor) -> int:
        """The number of the norm that reads what a tensor writes."""
        if tensor.layer is None:
            return 0
        inside = role(tensor.role).part == "attention" or tensor.role == "shortcut.attn"
        return 2 * tensor.layer + (1 if inside else 2)

    def _reading_at(self, norm_index: int) -> torch.Tensor:
        basis = self._bases[norm_index]
        return residual_bases.fitted(self._covariances[norm_index], basis) if self._refit else basis
