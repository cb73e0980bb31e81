"""One interface to TensorRT 10, TensorRT 11 and TensorRT-RTX, with a table of differences.

The three share nearly all of their Python names. `USED` lists the ones that we rely on, so that a
library that has lost one is refused by name, and tests compare it with the published bindings.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from prune_export.errors import MissingExtra, PlanError

Flavor = Literal["tensorrt", "rtx"]


@dataclass(frozen=True)
class Features:
    """The features in which the libraries differ.

    `says_strongly_typed`: networks must be told to keep the graph's types; 11 knows nothing else.
    `builds_ahead`: builds without a GPU, for `targets`; the kernels are then chosen on the device,
    so that nothing of a build tells which of them run. `timing_cache`: keeps what it timed.
    `version_compatible`: can write engines for later versions. `compiles_at_start`: the engine is
    finished when it is opened.
    """

    says_strongly_typed: bool
    builds_ahead: bool
    timing_cache: bool
    version_compatible: bool
    compiles_at_start: bool
    targets: tuple[str, ...] = ()


_TENSORRT_10: Final = Features(
    says_strongly_typed=True,
    builds_ahead=False,
    timing_cache=True,
    version_compatible=True,
    compiles_at_start=False,
)
_TENSORRT_11: Final = Features(
    says_strongly_typed=False,
    builds_ahead=False,
    timing_cache=True,
    version_compatible=True,
    compiles_at_start=False,
)
_RTX: Final = Features(
    says_strongly_typed=True,
    builds_ahead=True,
    timing_cache=False,  # 1.2 made its operations no-ops
    version_compatible=False,  # its wheel has no lean runtime to put into the engine
    compiles_at_start=True,
    targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
)
FEATURES: Final[Mapping[tuple[Flavor, int], Features]] = {
    ("tensorrt", 10): _TENSORRT_10,
    ("tensorrt", 11): _TENSORRT_11,
    ("rtx", 1): _RTX,
}
_OLDEST: Final[Mapping[tuple[Flavor, int], tuple[int, int]]] = {
    ("tensorrt", 10): (10, 15),  # the first whose parser takes `Attention` and may decompose it
    ("rtx", 1): (1, 4),
}
_MODULES: Final[Mapping[Flavor, tuple[str, ...]]] = {
    "tensorrt": ("tensorrt", "tensorrt_bindings"),
    "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
EXTRAS: Final[Mapping[Flavor, str]] = {"tensorrt": "tensorrt", "rtx": "tensorrt-rtx"}

USED: Final[Mapping[str, tuple[str, ...]]] = {
    "Builder": (
        "create_builder_config",
        "create_network",
        "create_optimization_profile",
        "build_serialized_network",
    ),
    "BuilderFlag": ("SPARSE_WEIGHTS", "VERSION_COMPATIBLE"),
    "EngineInspector": ("get_engine_information",),
    "IBuilderConfig": (
        "add_optimization_profile",
        "create_timing_cache",
        "profiling_verbosity",
        "set_flag",
        "set_timing_cache",
    ),
    "ICudaEngine": (
        "create_engine_inspector",
        "create_execution_context",
        "create_runtime_config",
        "get_tensor_dtype",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_shape",
        "num_io_tensors",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "get_tensor_shape",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "IHostMemory": ("nbytes",),
    "ILogger": ("log",),
    "INetworkDefinition": ("get_input", "num_inputs"),
    "IOptimizationProfile": ("set_shape",),
    "ITensor": ("name", "shape"),
    "ITimingCache": ("serialize",),
    "LayerInformationFormat": ("JSON",),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ParserError": ("desc",),
    "ProfilingVerbosity": ("DETAILED",),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "TensorIOMode": ("INPUT",),
}
"""Every class of the bindings that we use, with the names that we use of it."""

USED_OF_RTX: Final[Mapping[str, tuple[str, ...]]] = {
    "ComputeCapability": ("CURRENT",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER", "NONE"),
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "IRuntimeConfig": ("dynamic_shapes_kernel_specialization_strategy",),
}
"""What only TensorRT-RTX has."""


@dataclass(frozen=True)
class Binding:
    """A loaded library: its Python module, which of the three it is, and its features."""

    module: Any
    flavor: Flavor
    version: str
    features: Features

    @staticmethod
    def load(flavor: Flavor) -> Binding:
        """Loads the installed library of a flavor.

        Raises:
            MissingExtra: it is not installed, or its own libraries cannot be loaded.
            PlanError: its version is not one that is known here.
        """
        try:
            module = importlib.import_module(_module(flavor))
        except ImportError as error:
            raise MissingExtra(
                f"exporter tensorrt  flavor: {flavor}",
                f"its library cannot be loaded: {error}",
                f'run `pip install "prune-export[{EXTRAS[flavor]}]"`',
            ) from error
        return Binding.of(module, flavor)

    @staticmethod
    def of(module: Any, flavor: Flavor) -> Binding:
        """Makes the binding of an imported module.

        Raises:
            PlanError: its version is not one that is known here, or lacks what we use.
        """
        version = str(module.__version__)
        numbers = tuple(int(part) for part in version.split(".")[:2])
        kind = (flavor, numbers[0])
        if kind not in FEATURES or numbers < _OLDEST.get(kind, (0, 0)):
            raise PlanError(
                f"exporter tensorrt  flavor: {flavor}",
                f"got version {version}, expected {_known(flavor)}",
                f'run `pip install "prune-export[{EXTRAS[flavor]}]"`',
            )
        missing = lacking(module, flavor)
        if missing:
            raise PlanError(
                f"exporter tensorrt  flavor: {flavor}",
                f"version {version} lacks {', '.join(missing)}",
                "install a version of the same major number, and report this one",
            )
        return Binding(module, flavor, version, FEATURES[kind])


def installed(flavor: Flavor) -> bool:
    """Whether a library of this flavor is installed; does not load it."""
    return any(find_spec(name) is not None for name in _MODULES[flavor])


def lacking(module: Any, flavor: Flavor) -> list[str]:
    """Lists names that we use and the module lacks, such as `BuilderFlag.SPARSE_WEIGHTS`."""
    used = [USED, USED_OF_RTX] if flavor == "rtx" else [USED]
    return [
        f"{kind}.{name}"
        for table in used
        for kind, names in table.items()
        for name in names
        if not hasattr(getattr(module, kind, None), name)
    ]


def _module(flavor: Flavor) -> str:
    found = [name for name in _MODULES[flavor] if find_spec(name) is not None]
    return found[0] if found else _MODULES[flavor][-1]


def _known(flavor: Flavor) -> str:
    majors = [major for kind, major in FEATURES if kind == flavor]
    oldest = [_OLDEST.get((flavor, major), (major, 0)) for major in majors]
    return " or ".join(f"{low[0]}.{low[1]} and later {low[0]}.x" for low in oldest)
