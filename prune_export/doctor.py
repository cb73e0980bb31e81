"""Finds out what this machine can do with the package, and what is missing for what.

Nothing is fetched and nobody is asked over a network; what the extras bring is read from the
package's own metadata, so that no list of packages is kept here.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prune_export import registry
from prune_export.errors import PruneExportError
from prune_export.exporter_facts import ExporterFacts
from prune_export.machine import cpu_features, describe
from prune_export.planning.sparsity_rules import AMPERE
from prune_export.system.platforms import usable_cores
from prune_export.system.temporary import temporary_place

DISTRIBUTION: Final = "prune-export"
PURPOSES: Final[Mapping[str, str]] = {
    "data": "datasets of the Hub and Parquet files as data",
    "gguf": "models in .gguf files, and the files of gguf",
    "heal": "heal stages",
    "onnx": "engines of onnx and ort_genai, and the graphs of tensorrt",
    "tensorrt": "engines of tensorrt",
    "tensorrt-rtx": "engines of tensorrt for RTX, built ahead of time",
    "eval": "verify.quality.tasks, with lm-eval",
    "ray": "searches with executor: ray",
    "server": "serving over HTTP: prune-export serve",
    "sign": "publish --sign",
}
"""What a user needs each extra for; those for developers are left out."""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its name, memory in bytes, compute capability, what its tensor cores take."""

    name: str
    capability: str
    memory_bytes: int
    free_bytes: int
    sparse_tensor_cores: bool
    bfloat16: bool
    fp8: bool


@dataclass(frozen=True)
class Package:
    """A distribution that is needed: its version here, empty where missing, and what is wanted."""

    name: str
    version: str
    wanted: str
    ok: bool


@dataclass(frozen=True)
class Extra:
    """An extra: what it is for, and its packages; `ok` where all of them are there."""

    name: str
    purpose: str
    packages: tuple[Package, ...]
    ok: bool


@dataclass(frozen=True)
class Missing:
    """Something that cannot be done here: what, why, and the command that mends it, if any."""

    what: str
    why: str
    command: str = ""


@dataclass(frozen=True)
class Disk:
    """A place where files are written, and the bytes that are free there."""

    what: str
    path: str
    free_bytes: int


@dataclass(frozen=True)
class Hub:
    """The Hub as it would be used: whether somebody is logged in, where, and whether offline."""

    logged_in: bool
    offline: bool
    endpoint: str


@dataclass(frozen=True)
class Diagnosis:
    """What this machine can do; `missing` says what it cannot."""

    machine: Mapping[str, str]
    cores: int
    cpu_features: tuple[str, ...]
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    torch_cuda: str
    providers: tuple[str, ...]
    exporters: Mapping[str, bool]
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    disks: tuple[Disk, ...]
    hub: Hub
    missing: tuple[Missing, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether the package itself has all that it needs."""
        return all(one.ok for one in self.packages)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"ok": self.ok}


def diagnose(store: Path) -> Diagnosis:
    """Looks at this machine and at what is installed; `store` is where artifacts would be kept."""
    installed = _is_installed()
    requirements = list(_requirements(DISTRIBUTION)) if installed else []
    packages = tuple(_package(one) for one in requirements if _applies(one, ""))
    extras = tuple(_extra(name, requirements) for name in (_extras() if installed else ()))
    gpus, torch_cuda = _gpus()
    providers = _providers()
    memory = psutil.virtual_memory()
    missing = []
    if not installed:
        missing.append(
            Missing(
                "knowing what is installed",
                f"{DISTRIBUTION} is imported from a folder, and was never installed",
                "pip install -e .[all]",
            )
        )
    elif not all(one.ok for one in packages):
        update = f"pip install --upgrade {DISTRIBUTION}"
        missing.append(Missing("everything", _lacking(packages), update))
    missing += [
        Missing(one.purpose, _lacking(one.packages), f'pip install "{DISTRIBUTION}[{one.name}]"')
        for one in extras
        if not one.ok
    ]
    exporters = dict(_exporters(gpus))
    missing += _missing_hardware(gpus, torch_cuda, providers)
    return Diagnosis(
        machine=describe(),
        cores=usable_cores(),
        cpu_features=cpu_features(),
        memory_bytes=int(memory.total),
        available_bytes=int(memory.available),
        gpus=gpus,
        torch_cuda=torch_cuda,
        providers=providers,
        exporters=exporters,
        packages=packages,
        extras=extras,
        disks=tuple(_disks(store)),
        hub=_hub(),
        missing=tuple(missing),
    )


def _is_installed() -> bool:
    try:
        metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return False
    return True


def _requirements(distribution: str) -> Iterator[Requirement]:
    for line in metadata.requires(distribution) or ():
        yield Requirement(line)


def _applies(one: Requirement, extra: str) -> bool:
    return one.marker is None or one.marker.evaluate({"extra": extra})


def _extras() -> list[str]:
    """The extras that the installed package offers to users, in the order of `PURPOSES`."""
    offered = {
        canonicalize_name(name)
        for name in metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ()
    }
    return [name for name in PURPOSES if name in offered]


def _extra(name: str, requirements: list[Requirement]) -> Extra:
    found = [one for one in requirements if _applies(one, name) and not _applies(one, "")]
    packages = tuple(_package(one) for one in found)
    return Extra(name, PURPOSES[name], packages, all(one.ok for one in packages))


def _package(one: Requirement) -> Package:
    """A requirement against what is installed; extras of other packages are looked into, too."""
    try:
        version = metadata.version(one.name)
    except metadata.PackageNotFoundError:
        return Package(one.name, "", str(one.specifier), False)
    ok = one.specifier.contains(version, prereleases=True)
    inner = [
        other
        for extra in one.extras
        for other in _requirements(one.name)
        if _applies(other, extra) and not _applies(other, "")
    ]
    return Package(one.name, version, str(one.specifier), ok and all(_package(x).ok for x in inner))


def _lacking(packages: tuple[Package, ...]) -> str:
    words = []
    for one in packages:
        if not one.ok:
            found = f"{one.version} is installed" if one.version else "is not installed"
            words.append(f"{one.name}{one.wanted and f' {one.wanted}'}: {found}")
    return "; ".join(words)


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The CUDA devices that torch sees, and the CUDA version that it was built for."""
    import torch

    built = str(torch.version.cuda or "")
    if not torch.cuda.is_available():
        return (), built
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        level = 10 * major + minor
        found.append(
            Gpu(
                name=torch.cuda.get_device_name(index),
                capability=f"{major}.{minor}",
                memory_bytes=int(total),
                free_bytes=int(free),
                sparse_tensor_cores=level >= AMPERE,
                bfloat16=level >= AMPERE,
                fp8=level >= 89,
            )
        )
    return tuple(found), built


def _providers() -> tuple[str, ...]:
    """The execution providers of the ONNX Runtime that is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return ()
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())


def _exporters(gpus: tuple[Gpu, ...]) -> Iterator[tuple[str, bool]]:
    """Each exporter, and whether a device is here that its engines run on."""
    here = {"cpu"} | ({"cuda"} if gpus else set())
    for name in registry.names("exporters"):
        try:
            runs_on = ExporterFacts.of_name(name).runs_on
        except (ImportError, PruneExportError):
            yield name, False
        else:
            yield name, runs_on is None or bool(runs_on & here)


def _missing_hardware(
    gpus: tuple[Gpu, ...], torch_cuda: str, providers: tuple[str, ...]
) -> Iterator[Missing]:
    if not gpus:
        yield _no_gpu(torch_cuda)
    elif not any(one.sparse_tensor_cores for one in gpus):
        yield Missing(
            "sparse kernels on the GPU",
            f"tensor cores skip zeros from compute capability {AMPERE / 10:g} on",
        )
    if gpus and providers and "CUDAExecutionProvider" not in providers:
        yield Missing(
            "engines of onnx on the GPU",
            "the ONNX Runtime that is installed has no CUDA provider",
            "pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        yield Missing(
            "engines of aoti, and packed weights",
            "no C++ compiler is on the PATH",
            "apt-get install g++" if sys.platform == "linux" else "",
        )


def _no_gpu(torch_cuda: str) -> Missing:
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if driver and not torch_cuda:
        return Missing(
            "everything on the GPU",
            "an NVIDIA driver is here, but torch is a build without CUDA",
            "install torch for your CUDA version",
        )
    if driver:
        return Missing(
            "everything on the GPU",
            f"torch is built for CUDA {torch_cuda}, but reaches no device",
            "nvidia-smi",
        )
    return Missing("engines that need a GPU, and its speed", "there is no CUDA device here")


def _disks(store: Path) -> Iterator[Disk]:
    from huggingface_hub import constants

    places = {
        "store": store,
        "Hub's cache": Path(constants.HF_HUB_CACHE),
        "temporary files": temporary_place(),
        "here": Path.cwd(),
    }
    for what, path in places.items():
        there = path.absolute()
        while not there.exists() and there != there.parent:
            there = there.parent
        yield Disk(what, str(path), shutil.disk_usage(there).free)


def _hub() -> Hub:
    from huggingface_hub import constants, get_token

    return Hub(
        logged_in=bool(get_token()),
        offline=bool(constants.HF_HUB_OFFLINE),
        endpoint=str(constants.ENDPOINT),
    )
