"""Zeroes weights by magnitude, input norm and gradient of the loss (GBLM-Pruner).

With N windows, T tokens in each, g a window's gradient of its mean-token loss, and x an input:

    released:  |W| (sqrt(sum x^2 / N) + alpha G)
    paper:     |W| (sqrt(sum x^2)     + alpha G)       G = sum |g|  or  sqrt(sum g^2)

The released code keeps Wanda's running mean over windows, so its alpha weighs the gradients
sqrt(N) times as much as the paper's formula does. Both depend on N: were there more windows, sums
would grow and means would not. Up to the 128 windows that alpha was published with, scores are
exactly the above, so that gradients of few windows weigh less, as they do there; with more windows
they are what 128 such windows would give (ADR 0020). T is not made up for: sum x^2 / N grows with
T, and g falls to a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import Field

from prune_export.arch import Arch, Tensor
from prune_export.calibrate import ExtraPass, InputNorms, ModelView, Sums, block_bytes, linears
from prune_export.contracts import Decision
from prune_export.pruning.sparse import sparse_method

_WINDOWS: Final = 128
"""More of them weigh gradients no more than so many."""


@dataclass(frozen=True)
class Gblm(sparse_method.CalibratedSparseMethod):
    """Zero the weights with the least |weight| x (norm of input + alpha x norm of gradient).

    The gradients are those of the dense model, streamed one block at a time.

    Source: Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language
    Models", arXiv:2311.04902, section 3; the two conventions of alpha are explained in this file.
    Differs: gradients are in float32, without dropout; sums over more than 128 windows are brought
    to 128; by default each matrix sees what the pruned earlier ones of its block give, its norms
    corrected as Wanda's are.
    """

    VERSION: ClassVar[str] = "2"

    norm: Annotated[
        Literal["l1", "l2"],
        Field(
            description="Over windows, of a weight's gradients: sum of sizes, or root of squares."
        ),
    ] = "l1"
    alpha: Annotated[
        float, Field(ge=0, description="How much gradients weigh beside inputs; 0 is Wanda.")
    ] = 100.0
    alpha_convention: Annotated[
        Literal["released", "paper"],
        Field(
            description="`released`: inputs are averaged over windows, as in the authors' code; "
            "`paper`: summed, as in the formula, where alpha weighs gradients less, by the root of "
            "the windows' number (11.3 times for 128 or more)."
        ),
    ] = "released"

    def statistics(self, arch: Arch) -> tuple[ExtraPass, ...]:
        """The passes that `decide` makes: forward, backward, and the sequential pass."""
        # A block's gradients and their sums; all blocks' scores are kept in files.
        ram = 2 * block_bytes(arch, torch.float32)
        disk = 4 * sum(prod(arch.shape(tensor)) for tensor in linears(arch))
        sweeps = super().statistics(arch)
        # A matrix's gradients, and their share of its scores.
        more = 8 * max(prod(arch.shape(tensor)) for tensor in linears(arch))
        return (
            ExtraPass(forwards=4, ram_bytes=ram, disk_bytes=disk),
            *(
                ExtraPass(
                    forwards=one.forwards,
                    ram_bytes=one.ram_bytes + more,
                    disk_bytes=one.disk_bytes + disk,
                    suspends=one.suspends,
                )
                for one in sweeps
            ),
        )

    def decide(self, model: ModelView) -> Decision:
        windows = model.calibration().tokens.samples
        found = model.gradients(Norms(self.norm, windows))

        def own(weight: torch.Tensor, seen: InputNorms, tensor: Tensor) -> torch.Tensor:
            gradient = found.matrix(tensor).to(weight.device).contiguous()
            return score(weight, seen, gradient, self.share(seen.tokens, windows))

        return sparse_method.zero_least(self, model, own, corrects=True)

    def share(self, tokens: int, windows: int) -> float:
        """The factor of gradient norms beside input norms that are root mean squares over `tokens`.

        `Norms` are means over windows. Both terms are divided by what makes the first one that.
        """
        counted = min(windows, _WINDOWS)
        of_sum = counted if self.norm == "l1" else sqrt(counted)
        of_input = sqrt(tokens / windows)
        if self.alpha_convention == "paper":
            of_input *= sqrt(counted)
        return self.alpha * of_sum / of_input


def score(
    weight: torch.Tensor, seen: InputNorms, gradient: torch.Tensor, share: float
) -> torch.Tensor:
    """Scores weights `[out, in]`: |weight| times the sum of its input's norm and its gradient's."""
    norms = (seen.sums / seen.tokens).sqrt()
    return gradient.mul(share).add_(norms).mul_(weight.abs())


@dataclass(frozen=True)
class Norms:
    """Reduces each matrix's gradients, over windows, to their mean size or root mean square."""

    norm: Literal["l1", "l2"]
    windows: int

    @property
    def key(self) -> str:
        """JSON that identifies what it keeps."""
        return f"gblm-1 {self.norm} {self.windows}"

    @property
    def kinds(self) -> tuple[Any, ...]:
        """What is summed over windows: sizes or squares."""
        return ("abs",) if self.norm == "l1" else ("square",)

    def wants(self, layer: int, name: str) -> bool:
        """Wants every parameter; those that are no matrix are small, and dropped in `keep`."""
        del layer, name
        return True

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Averages over windows, for parameters that are matrices."""
        del layer
        kind = self.kinds[0]
        means = {
            name: own[kind].div_(self.windows)
            for name, own in sums.items()
            if parameters[name].dim() > 1
        }
        return means if self.norm == "l1" else {name: one.sqrt_() for name, one in means.items()}
