"""LoRA: trains low-rank adapters on the checkpoint, and merges them.

Source: Hu et al., LoRA (2106.09685); what is trained, and for how long: Gromov et al., The
Unreasonable Ineffectiveness of the Deeper Layers (2403.17887), appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.contracts import Cost, HealRecord, Work
from prune_export.machine import Machine
from prune_export.training import heal as training
from prune_export.training import memory
from prune_export.training.adapters.targets import targets
from prune_export.training.model import require
from prune_export.training.settings import Settings


@dataclass(frozen=True)
class Lora(Settings):
    """Heals with low-rank adapters (LoRA), then merges them into the weights.

    The frozen model is held in the compute dtype. Needs the extra `heal`.

    Source: Hu et al., "LoRA", arXiv:2106.09685, section 4.
    """

    VERSION: ClassVar[str] = "3"

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (PlanError, MissingExtra)."""
        del machine
        require("heal: lora", "peft", "accelerate")
        targets(self.targets, arch)

    def cost(self, arch: Arch, tokens: int, length: int, machine: Machine | None = None) -> Cost:
        """Estimates the cost; every step trains whole windows, however many `tokens` there are."""
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
