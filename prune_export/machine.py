"""The machine's memory, threads and GPU, and how much of them the work may use.

Machine settings are recorded beside results and not hashed into an artifact's id: the same recipe
on another machine is the same artifact. What timed this machine is the exception
(`Machine.timing_identity`): its id says which one.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import psutil

from prune_export.exporter_facts import packages_of_exporters
from prune_export.system.platforms import usable_cores

_FEATURES: Final = frozenset(
    [
        "sse4_2",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vbmi2",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_int8",
        "amx_bf16",
        "neon",
        "asimd",
        "asimddp",
        "i8mm",
        "bf16",
        "sve",
        "sve2",
    ]
)
"""The instruction sets that kernels of language models are written for."""

_COMPUTING: Final = ("torch", "transformers")
_HEALING: Final = ("peft", "bitsandbytes")


@dataclass(frozen=True)
class Machine:
    """The limits of the work on this machine: memory, GPU memory, threads.

    `ram_bytes` is the budget for a process, Python and torch included; `gpu_bytes` is that for what
    is on the GPU, 0 without a CUDA device; `threads` is the number of compute threads; `capability`
    is ten times the GPU's compute capability (89 for 8.9), 0 without one.
    """

    device: Literal["cpu", "cuda"]
    ram_bytes: int
    gpu_bytes: int
    threads: int
    capability: int = 0

    def share(self, processes: int) -> Machine:
        """What one of several processes may use; each has a GPU of its own, if there are any."""
        return replace(
            self,
            ram_bytes=self.ram_bytes // processes,
            threads=max(1, self.threads // processes),
        )

    def timing_identity(self) -> dict[str, str]:
        """What a time that was measured here depends on: device, processor, GPU and threads."""
        found = {
            "device": self.device,
            "processor": _processor(),
            "threads": str(self.threads),
        }
        return found | ({"gpu": _gpu_name()} if self.device == "cuda" else {})

    @staticmethod
    def detect(
        *, device: str | None = None, ram_bytes: int | None = None, threads: int | None = None
    ) -> Machine:
        """This machine; memory is what is free now, on the GPU too; RAM may be given, in bytes."""
        gpu_bytes = _free_gpu_bytes() if device != "cpu" else None
        chosen: Literal["cpu", "cuda"] = "cpu" if gpu_bytes is None else "cuda"
        return Machine(
            device=chosen,
            ram_bytes=ram_bytes or int(psutil.virtual_memory().available),
            gpu_bytes=gpu_bytes or 0,
            threads=threads or usable_cores(),
            capability=_capability() if chosen == "cuda" else 0,
        )


def user_cache() -> Path:
    """Finds this user's cache directory; it need not exist yet.

    Raises:
        RuntimeError: the user has no home directory, and the environment names no cache.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "prune_export"


def _free_gpu_bytes() -> int | None:
    """The free memory of the GPU in bytes; None without a GPU.

    What torch has in this process and does not use counts as free.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(0)
    return int(free + torch.cuda.memory_reserved(0) - torch.cuda.memory_allocated(0))


def _capability() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    return 10 * major + minor


def describe() -> dict[str, str]:
    """Describes the machine for a measurement: processor, cores, memory, system, GPU, versions."""
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    found = {
        "processor": _processor(),
        "cores": str(usable_cores()),
        "memory_bytes": str(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "gpu": _gpu_name(),
    }
    packages = (*_COMPUTING, *packages_of_exporters(), *_HEALING, "prune-export")
    found |= {package: version(package) for package in packages}
    return {key: value for key, value in found.items() if value}


def cpu_features() -> tuple[str, ...]:
    """The processor's instruction sets that matter for matrix products; empty if unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, flags = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return tuple(flag for flag in flags.split() if flag in _FEATURES)
    except OSError:
        pass
    return ()


def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name(0)) if torch.cuda.is_available() else ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
