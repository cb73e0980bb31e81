"""The devices that a plan is for: this machine's, several processes, or others that are not here.

Healing and the teacher's cache are shared by all processes, each with a device and the whole model
in training; all else is done by the first.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from prune_export.contracts import Cost
from prune_export.machine import Machine

_AMPERE: Final = 80
"""The compute capability that devices are taken to have that are not here: bfloat16 products."""

TFLOPS: Final = 120.0
"""What such a device is taken to do in training, sustained: two fifths of an A100's 312 in bfloat16
(NVIDIA A100 data sheet)."""


@dataclass(frozen=True)
class Devices:
    """`count` processes with a device each, `here` of them on one machine.

    `bytes` is the memory of each device, None that of this machine; `flops` what each does a
    second where they are not this machine's.
    """

    count: int = 1
    here: int = 1
    bytes: int | None = None
    flops: float = TFLOPS * 1e12

    @property
    def elsewhere(self) -> bool:
        """Whether they are not this machine's."""
        return self.bytes is not None

    def machine(self, here: Machine) -> Machine:
        """The machine that a plan is for, one device of it; memory and threads are `here`'s."""
        if self.bytes is None:
            return here
        return Machine("cuda", here.ram_bytes, self.bytes, here.threads, _AMPERE)

    def shared(self, cost: Cost, parts: int) -> Cost:
        """The cost of work of so many parts that all processes share, as long as they last."""
        sharing = min(self.count, parts)
        return dataclasses.replace(
            cost,
            ram_bytes=cost.ram_bytes * self.here,
            flops=cost.flops / sharing,
            bfloat16_flops=cost.bfloat16_flops / sharing,
        )

    def note(self, parts: int) -> str:
        """Says who shares such work; empty where nobody does."""
        if self.count == 1:
            return ""
        idle = f", of which {parts} have a part in a step" if parts < self.count else ""
        return f"in {self.count} processes{idle}"


HERE: Final = Devices()
"""This machine, one process."""
