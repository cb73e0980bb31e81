"""QLoRA: trains low-rank adapters on a 4-bit copy of the checkpoint, and merges them.

Source: Dettmers et al., QLoRA (2305.14314); what is trained, and for how long: Gromov et al., The
Unreasonable Ineffectiveness of the Deeper Layers (2403.17887), appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prune_export.arch import Arch
from prune_export.calibrate import TokenSet
from prune_export.contracts import Cost, HealRecord, Work
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.training import heal as training
from prune_export.training import memory
from prune_export.training.adapters.targets import stacks_experts, targets
from prune_export.training.model import require
from prune_export.training.settings import Quantization, Settings


@dataclass(frozen=True)
class Qlora(Settings):
    """Heals with low-rank adapters on a 4-bit base (QLoRA), then merges them into full weights.

    While it trains, every linear weight of the blocks is held in 4-bit NormalFloat by bitsandbytes,
    on a CPU or a GPU. Needs the extra `heal`.

    Source: Dettmers et al., "QLoRA", arXiv:2305.14314, sections 2 and 3.
    """

    VERSION: ClassVar[str] = "3"

    bits: Annotated[
        int, Field(ge=4, le=4, description="Bits of a frozen weight; 4 (NF4) is what there is.")
    ] = 4
    double_quant: Annotated[
        bool, Field(description="Quantize the scales of the 4-bit blocks too.")
    ] = True
    merge_into: Annotated[
        Literal["original", "quantized_base"],
        Field(
            description="The weights that the adapters are added to: the checkpoint's own, or what "
            "the 4-bit copy stands for. The latter is exactly what was trained, and leaves NF4's "
            "error in every linear weight."
        ),
    ] = "original"

    def __post_init__(self) -> None:
        """Refuses values that contradict each other.

        Raises:
            PlanError: `bits` is not 4, or what `Settings` refuses.
        """
        super().__post_init__()
        if self.bits != 4:
            raise PlanError(
                "bits", f"got {self.bits}, expected 4 (NF4)", "write `bits: 4`, or `method: lora`"
            )

    def check(self, arch: Arch, machine: Machine) -> None:
        """Refuses in the plan what cannot work (PlanError, MissingExtra)."""
        del machine
        require("heal: qlora", "peft", "accelerate", "bitsandbytes")
        targets(self.targets, arch)
        if stacks_experts(arch):
            raise PlanError(
                "heal: qlora",
                f"bitsandbytes does not quantize the stacked experts of a {arch.family} model, "
                "which are most of it",
                "use `method: lora` with attention targets",
            )

    def cost(self, arch: Arch, tokens: int, length: int, machine: Machine | None = None) -> Cost:
        """Estimates the cost; every step trains whole windows, however many `tokens` there are."""
        del tokens
        return memory.cost(arch, self, self._quantization, machine, length=length)

    def taught_cost(
        self, arch: Arch, teacher: Arch, samples: int, length: int, machine: Machine
    ) -> tuple[Cost, str]:
        """What healing takes with a teacher, and in a few words what is done with it."""
        return memory.taught_cost(arch, teacher, self, self._quantization, machine, samples, length)

    def heal(self, checkpoint: Path, tokens: TokenSet, out: Path, work: Work) -> HealRecord:
        """Heals `checkpoint` into the directory `out`, resuming from `work.scratch`."""
        return training.heal(self, self._quantization, checkpoint, tokens, out, work)

    @property
    def _quantization(self) -> Quantization:
        return Quantization(self.double_quant, self.merge_into)
