"""All weights of the blocks, trained as they are.

Source: Muralidharan et al., Compact Language Models (2407.14679), section 4, where all weights are
trained by distillation. For how long by default: Gromov et al., The Unreasonable Ineffectiveness of
the Deeper Layers (2403.17887), appendix B, as for adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.contracts import Cost, HealRecord, Work
from prune_export.machine import Machine
from prune_export.training import heal as training
from prune_export.training import memory
from prune_export.training.model import require
from prune_export.training.settings import Training


@dataclass(frozen=True)
class Full(Training):
    """Heals by training the weights themselves, those of the blocks and the norms.

    Weights are float32 while they are trained, with two more numbers each for AdamW and one for the
    gradient: 16 bytes a parameter. Where a pruned matrix is zero it stays so, after each step.
    Needs the extra `heal`.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation",
    arXiv:2407.14679, section 4.
    """

    VERSION: ClassVar[str] = "2"

    learning_rate: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 5e-5
    train_embeddings: Annotated[
        bool, Field(description="Train the embedding and the head too, which are most of some.")
    ] = False

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (MissingExtra)."""
        del arch, machine
        require("heal: full", "accelerate")

    def cost(self, arch: Arch, tokens: int, length: int, machine: Machine | None = None) -> Cost:
        """What healing takes; every step trains whole windows, however many `tokens` there are."""
        del tokens
        return memory.cost(arch, self, None, machine, length=length)

    def taught_cost(
        self, arch: Arch, teacher: Arch, samples: int, length: int, machine: Machine
    ) -> tuple[Cost, str]:
        """What healing takes with a teacher, and in a few words what is done with it."""
        return memory.taught_cost(arch, teacher, self, None, machine, samples, length)

    def heal(self, checkpoint: Path, tokens: TokenSet, out: Path, work: Work) -> HealRecord:
        """Heals `checkpoint` into the directory `out`, resuming from `work.scratch`."""
        return training.heal(self, None, checkpoint, tokens, out, work)
