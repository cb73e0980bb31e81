"""A plan as data: steps, sizes and costs; and this machine's rates, for time estimates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.calibrate import native_dtype
from prune_export.contracts import Cost
from prune_export.display.notebook import html_table
from prune_export.errors import PlanError
from prune_export.machine import Machine
from prune_export.planning.devices import HERE, Devices
from prune_export.planning.rows import columns_of, rows_of, sums_of, title_of

_BUSIEST: Final = 4.0
"""A machine that is busier than this is so for a short time, one hopes."""


@dataclass(frozen=True)
class Size:
    """The size of a model: blocks, stored parameters and bytes."""

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class PlannedStage:
    """One step: its name, the model's size before and after it, and its cost."""

    kind: str
    name: str
    parameters: Mapping[str, Any]
    before: Size
    after: Size
    cost: Cost
    seconds: float
    note: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of a search: seconds of one piece of each kind of its work, by which a run goes on."""


@dataclass(frozen=True)
class Plan:
    """A plan: every step in order, with peaks and sums of their costs."""

    recipe: str
    model: str
    family: str
    stages: tuple[PlannedStage, ...]
    machine: Machine
    archs: tuple[Arch, ...]
    lacking: tuple[PlanError, ...] = ()
    devices: Devices = HERE
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses a plan for which this machine lacks memory or disk.

        Raises:
            PlanError: the first thing that is lacking; `lacking` has all of them.
        """
        if self.lacking:
            raise self.lacking[0]

    @property
    def peak_ram_bytes(self) -> int:
        """The peak of memory over all steps."""
        return max((stage.cost.ram_bytes for stage in self.stages), default=0)

    @property
    def peak_gpu_bytes(self) -> int:
        """The peak of GPU memory over all steps."""
        return max((stage.cost.gpu_bytes for stage in self.stages), default=0)

    @property
    def disk_bytes(self) -> int:
        """The bytes that all steps write: store and result."""
        return sum(stage.cost.disk_bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """The estimated time of all steps."""
        return sum(stage.seconds for stage in self.stages)

    def _repr_html_(self) -> str:
        """The plan in a notebook: a row a step, and what this machine lacks."""
        note = ". ".join([sums_of(self), *(f"{e.where}: {e.problem}" for e in self.lacking)])
        return html_table(title_of(self), columns_of(self), rows_of(self), note)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "recipe": self.recipe,
            "model": self.model,
            "family": self.family,
            "peak_ram_bytes": self.peak_ram_bytes,
            "peak_gpu_bytes": self.peak_gpu_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": round(self.seconds, 1),
            "machine": dataclasses.asdict(self.machine),
            "devices": dataclasses.asdict(self.devices),
            "notes": list(self.notes),
            "lacking": [f"{error.where}: {error.problem}" for error in self.lacking],
            "stages": [
                dataclasses.asdict(stage) | {"parameters": dict(stage.parameters)}
                for stage in self.stages
            ],
        }


@dataclass(frozen=True)
class Rates:
    """This machine's rates: FLOPs a second (a multiply-add is 2) and bytes written a second."""

    flops: float
    disk_bytes: float
    bfloat16_flops: float

    @staticmethod
    def known(flops: float) -> Rates:
        """The rates of a device that is not here; the disk is taken at 400 MB/s."""
        return Rates(flops, 400e6, flops)

    @staticmethod
    def measure(machine: Machine) -> Rates:
        """Measures small matrix products for about 0.2 s; the disk is taken at 400 MB/s.

        One thread is timed and the fastest product counts, as what else the machine does disturbs
        the others.
        """
        wide = _products_a_second(machine, dtype="float32")
        # A model's products are smaller and have other work between them. Half of it makes the
        # bundled demonstration's estimate 9 min 50 s; it took 13 min 26 s.
        rate = wide / 2
        if native_dtype(machine).itemsize == 4:
            return Rates(rate, 400e6, rate)
        # The faster the products, the more the rest weighs: on an EPYC with AVX512-BF16 steps ran
        # at 0.33 (QLoRA) to 0.54 (all weights) of the rate of products alone.
        narrow = 0.4 * _products_a_second(machine, dtype="bfloat16")
        return Rates(rate, 400e6, max(rate, narrow))

    def seconds(self, cost: Cost) -> float:
        """Estimates the time of a cost on this machine."""
        narrow = cost.bfloat16_flops
        products = (cost.flops - narrow) / self.flops + narrow / self.bfloat16_flops
        return cost.seconds + products + cost.moved_bytes / self.disk_bytes


def _products_a_second(machine: Machine, *, dtype: str) -> float:
    """The FLOPs a second of matrix products in a dtype, on all threads that a machine may use."""
    import torch

    size = 512 if machine.device == "cpu" else 4096
    a = torch.ones(size, size, device=machine.device, dtype=getattr(torch, dtype))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (a @ a).sum().item()
    fastest, end = float("inf"), time.perf_counter() + 0.1
    while time.perf_counter() < end:
        began = time.perf_counter()
        (a @ a).sum().item()
        fastest = min(fastest, time.perf_counter() - began)
    torch.set_num_threads(threads)
    together = machine.threads if machine.device == "cpu" else 1
    return together * 2.0 * size**3 / fastest


def how_busy(seconds: float = 0.3) -> float:
    """How many times as long as alone work takes here now, as others use the machine: 1 to 4.

    That is real over processor time of a loop that never waits.
    """
    began, worked = time.perf_counter(), time.thread_time()
    while time.perf_counter() - began < seconds:
        sum(range(1000))
    worked = time.thread_time() - worked
    return min(max((time.perf_counter() - began) / max(worked, 1e-3), 1.0), _BUSIEST)


def together(one: Cost, other: Cost) -> Cost:
    """The cost of two pieces of work, one after the other."""
    return Cost(
        ram_bytes=max(one.ram_bytes, other.ram_bytes),
        gpu_bytes=max(one.gpu_bytes, other.gpu_bytes),
        disk_bytes=one.disk_bytes + other.disk_bytes,
        flops=one.flops + other.flops,
        moved_bytes=one.moved_bytes + other.moved_bytes,
        seconds=one.seconds + other.seconds,
        bfloat16_flops=one.bfloat16_flops + other.bfloat16_flops,
    )
