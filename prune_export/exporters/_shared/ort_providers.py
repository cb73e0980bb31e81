"""ONNX Runtime's execution providers: their names, options and limits, and which nodes they ran.

    cpu           everywhere
    cuda          NVIDIA GPUs, onnxruntime-gpu
    tensorrt      the same wheel, with TensorRT 10 beside it; the only one with sparse kernels
    tensorrt_rtx  GeForce and RTX GPUs, a plug-in wheel of its own

TensorRT builds an engine for a range of shapes when the session opens and keeps it in a cache
outside of the export, whose files never change.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from prune_export.contracts import Placement
from prune_export.errors import MissingExtra, PlanError, StageError
from prune_export.exporters._shared.ort_links import openable
from prune_export.kernels.packing import OPERATOR as PACKED_OPERATOR
from prune_export.machine import Machine, user_cache

ProviderName = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt_rtx"]

NAMES: Final[Mapping[str, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt_rtx": "NvTensorRTRTXExecutionProvider",
}
_BEHIND: Final[Mapping[str, tuple[str, ...]]] = {
    "cpu": (),
    "cuda": ("cpu",),
    "tensorrt": ("cuda", "cpu"),
    "tensorrt_rtx": ("cpu",),
}
"""Who may take the nodes that a provider leaves, such as those that compute shapes."""

_WHEELS: Final[Mapping[str, str]] = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu and TensorRT 10",
    "tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
}
_PLUGIN: Final = "onnxruntime_ep_nv_tensorrt_rtx"

_MULTIPLY: Final = frozenset(
    {"MatMul", "Gemm", "Attention", "MatMulNBits", "MatMulInteger", "GroupQueryAttention", "Conv"}
)
"""Where the time goes: these must run on the provider that was asked for."""

RECORD: Final = "session.record_ep_graph_assignment_info"
"""Session setting without which the runtime forgets who was given what."""


@dataclass(frozen=True)
class Profile:
    """The largest shapes that TensorRT builds for; it is tuned for a whole prompt.

    Raises:
        PlanError: the prompt is longer than all.
    """

    batch: Annotated[int, Field(ge=1, description="most sequences at once")] = 1
    prompt: Annotated[int, Field(ge=1, description="prompt tokens to be fastest at")] = 512
    length: Annotated[int, Field(ge=1, description="most tokens, prompt and answer")] = 4096

    def __post_init__(self) -> None:
        if self.prompt > self.length:
            raise PlanError(
                "onnx.profile",
                f"got a prompt of {self.prompt} tokens in a length of {self.length}",
                f"write `length: {self.prompt}` or more",
            )


_REACHES_OUT: Final = re.compile(
    r"(?:^|_)(?:paths?|folder|files?|filename|libs?|library|plugins?|dump|prefix|bytestream|stream"
    r"|external|ep_context)(?:_|$)"
)
"""Options by which a provider opens files, loads libraries, or takes addresses in memory."""


@dataclass(frozen=True)
class Provider:
    """The execution provider that an export asks for; `auto` is the GPU where the runtime has one.

    Raises:
        PlanError: sparse kernels of a provider that has none.
    """

    name: ProviderName = "auto"
    precision: str = "fp32"
    sparse: bool = False
    profile: Profile = Profile()
    options: Mapping[str, str | int | float | bool] | None = None

    def __post_init__(self) -> None:
        for key in self.options or ():
            if _REACHES_OUT.search(key):
                raise PlanError(
                    f"onnx.provider_options.{key}",
                    "names a file, a library or an address, which a recipe or a report may not",
                    "leave it out; engines and their caches have places of their own",
                )
        if self.sparse and self.name != "tensorrt":
            raise PlanError(
                "onnx.sparse",
                f"`provider: {self.name}` has no kernels for sparse weights; ONNX Runtime reaches "
                "them through TensorRT only",
                "write `provider: tensorrt`, or export with `tensorrt` and `sparse: true`",
            )
        if self.options and self.name == "auto":
            raise PlanError(
                "onnx.provider_options",
                "are given for `provider: auto`, which may be another one on another machine",
                f"write which provider they are for: {', '.join(NAMES)}",
            )

    def resolved(self, machine: Machine) -> str:
        """Resolves `auto` for this machine, to a key of `NAMES`."""
        if self.name != "auto":
            return self.name
        # pip brings the onnxruntime for CPUs, and no machine should need another to begin with.
        # It knows no bfloat16.
        gpu = machine.device == "cuda" and (present("cuda") or self.precision == "bf16")
        return "cuda" if gpu else "cpu"

    def note(self, machine: Machine) -> str:
        """A note where `auto` leaves a GPU unused, else empty."""
        if self.name != "auto" or machine.device != "cuda" or self.resolved(machine) == "cuda":
            return ""
        return f"on the CPU: the GPU needs {_WHEELS['cuda']} in the place of onnxruntime"

    def check(self, machine: Machine) -> None:
        """Refuses in the plan a provider that this onnxruntime doesn't have.

        Raises:
            PlanError: it does not have it, or the provider does not compute in this precision.
        """
        key = self.resolved(machine)
        if key == "cpu" and self.precision == "bf16":
            raise PlanError(
                "onnx.precision: bf16",
                "ONNX Runtime has no bfloat16 kernels for the CPU (none of Add, Mul and Where)",
                "write `precision: fp32` or `fp16`, export with `aoti`, which computes in bf16 "
                "here, or export on a machine with an NVIDIA GPU and onnxruntime-gpu",
            )
        if key != "cpu" and not present(key):
            other = "provider: cpu" if self.name == "auto" else "provider: auto"
            other = "precision: fp16" if self.precision == "bf16" else other
            raise PlanError(
                f"onnx.provider: {self.name}",
                f"the installed onnxruntime offers {', '.join(_offered())}",
                f"install {_WHEELS[key]}, or write `{other}`",
            )
        if self.name not in ("auto", "cpu") and machine.device == "cpu":
            raise PlanError(
                f"onnx.provider: {self.name}",
                "needs an NVIDIA GPU, and there is none (or `--device cpu` hides it)",
                "write `provider: auto`",
            )

    def chain(self, graph: Path, machine: Machine) -> list[tuple[str, dict[str, str]]]:
        """Lists providers in the order in which they may take nodes, each with its options."""
        first = self.resolved(machine)
        own = {"tensorrt": self._tensorrt, "tensorrt_rtx": self._rtx}.get(first)
        options = own(graph) if own else {}
        options |= {key: _text(value) for key, value in (self.options or {}).items()}
        return [(NAMES[first], options), *((NAMES[name], {}) for name in _BEHIND[first])]

    def _tensorrt(self, graph: Path) -> dict[str, str]:
        cache = str(_cache(graph, self))
        return {
            "trt_fp16_enable": _text(self.precision == "fp16"),
            "trt_bf16_enable": _text(self.precision == "bf16"),
            "trt_sparsity_enable": _text(self.sparse),
            "trt_engine_cache_enable": _text(True),
            "trt_engine_cache_path": cache,
            "trt_timing_cache_enable": _text(True),
            "trt_timing_cache_path": cache,
            **{f"trt_profile_{end}_shapes": text for end, text in self._shapes(graph).items()},
        }

    def _rtx(self, graph: Path) -> dict[str, str]:
        """Options of TensorRT-RTX, which takes types from the graph and has none for sparsity."""
        return {
            "nv_runtime_cache_path": str(_cache(graph, self)),
            **{f"nv_profile_{end}_shapes": text for end, text in self._shapes(graph).items()},
        }

    def _shapes(self, graph: Path) -> dict[str, str]:
        """Writes a profile for TensorRT: `name:1x2x3,…` of all inputs, least, best and largest."""
        from prune_export.sparsity.onnx_weights import load

        most = self.profile
        sizes = {
            "min": {"batch": 1, "sequence": 1, "total_sequence": 1, "past_sequence": 0},
            "opt": {"batch": 1, "sequence": most.prompt, "total_sequence": most.prompt,
                    "past_sequence": 0},
            "max": {"batch": most.batch, "sequence": most.length, "total_sequence": most.length,
                    "past_sequence": most.length - 1},
        }  # fmt: skip
        inputs = {
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in load(graph).graph.input
        }
        return {
            end: ",".join(
                f"{name}:{'x'.join(str(known.get(size, size)) for size in shape)}"
                for name, shape in inputs.items()
            )
            for end, known in sizes.items()
        }


def open_session(graph: Path, provider: Provider, machine: Machine, options: Any) -> Any:
    """Opens an `InferenceSession` on the provider asked for; never falls back to another one.

    Raises:
        MissingExtra: onnxruntime is not installed.
        StageError: the provider is not there, or the graph does not load.
        CheckpointError: the graph is a link, and names data of another model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra.of("ONNX Runtime", "onnxruntime", "onnx") from error
    key = provider.resolved(machine)
    if not present(key):
        raise StageError(
            f"{graph}  {NAMES[key]}",
            f"this onnxruntime offers {', '.join(_offered())}",
            f"install {_WHEELS.get(key, 'onnxruntime')}, or choose the device `cpu`",
        )
    options.add_session_config_entry(RECORD, "1")
    chain = provider.chain(graph, machine)
    given = openable(graph, options)
    if key == "tensorrt":
        # Pip's libraries lie where only this module finds them. Without it, or where they do not
        # load, the provider looks for others, and what comes of that is told below.
        with suppress(ImportError, OSError):
            importlib.import_module("tensorrt")
    try:
        if key == "tensorrt_rtx":
            _add_plugin(options, chain[0])
            session = onnxruntime.InferenceSession(given, options)
        else:
            session = onnxruntime.InferenceSession(given, options, providers=chain)
    except StageError:
        raise
    except Exception as error:  # onnxruntime's own classes share no public base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "report this with the recipe: the exporter wrote a graph that the runtime refuses"
        if PACKED_OPERATOR in reason:
            fix = "open it as the result that it is part of, whose report says that it is packed"
        raise StageError(
            str(graph), f"onnxruntime {onnxruntime.__version__} does not load it: {reason}", fix
        ) from error
    if NAMES[key] not in session.get_providers():
        raise StageError(
            f"{graph}  {NAMES[key]}",
            f"could not be used; the session fell back to {session.get_providers()}",
            "install the provider's libraries (CUDA, cuDNN, TensorRT), or choose the device `cpu`",
        )
    return session


def cache_device(key: str) -> str:
    """The device for the KV cache: the GPU, if the runtime can allocate there."""
    return "cuda" if key != "cpu" and NAMES["cuda"] in _offered() else "cpu"


def placement(session: Any, asked: str) -> Placement:
    """Counts the nodes of a session's graph by the provider that runs them.

    `asked` is the provider that was asked for.
    """
    counts: Counter[str] = Counter()
    strayed: list[str] = []
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            counts[part.ep_name] += 1
            if node.op_type in _MULTIPLY and part.ep_name != asked:
                strayed.append(node.name)
    return Placement(asked, dict(counts.most_common()), tuple(sorted(strayed)))


def runtime_version() -> str:
    """The version of the installed onnxruntime, whichever wheel it is from (as onnxruntime-gpu)."""
    import onnxruntime

    return str(onnxruntime.__version__)


def present(key: str) -> bool:
    """Whether the installed onnxruntime has a provider, by its key of `NAMES`."""
    import onnxruntime

    if key == "tensorrt_rtx":
        return importlib.util.find_spec(_PLUGIN) is not None or NAMES[key] in _offered()
    return NAMES[key] in onnxruntime.get_available_providers()


def _offered() -> Sequence[str]:
    import onnxruntime

    offered: Sequence[str] = onnxruntime.get_available_providers()
    return offered


def _add_plugin(options: Any, first: tuple[str, dict[str, str]]) -> None:
    """Adds the GPUs that the plug-in finds to the session.

    Raises:
        StageError: it finds none.
    """
    import onnxruntime

    name, settings = first
    plugin = importlib.import_module(_PLUGIN)
    if name not in {device.ep_name for device in onnxruntime.get_ep_devices()}:
        try:
            onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # onnxruntime's own classes share no public base
            raise StageError(
                name,
                f"the plug-in's library does not load: {error}",
                "it needs NVIDIA's driver and onnxruntime 1.25 or later; choose the device `cpu`",
            ) from error
    devices = [one for one in onnxruntime.get_ep_devices() if one.ep_name == name]
    if not devices:
        raise StageError(
            name,
            "the plug-in is installed and finds no GPU that it can use",
            "it needs a GeForce or RTX GPU and NVIDIA's driver; choose the device `cpu`",
        )
    options.add_provider_for_devices(devices[:1], settings)


def _cache(graph: Path, provider: Provider) -> Path:
    """The cache directory for engines built from this graph with these settings."""
    about = hashlib.sha256(graph.read_bytes())
    asked = [provider.precision, provider.sparse, provider.profile.__dict__, provider.options]
    about.update(json.dumps(asked, sort_keys=True).encode())
    data = graph.with_name(f"{graph.name}_data")
    if data.is_file():  # equal graphs may hold other weights; an engine has them built in
        about.update(_digest(data))
    try:
        root = user_cache()
    except RuntimeError:
        raise StageError(
            str(graph),
            "has an engine to keep, and this user has no home directory to keep it in",
            "set XDG_CACHE_HOME",
        ) from None
    folder = root / "engines" / about.hexdigest()[:20]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _text(value: str | int | float | bool) -> str:
    """Words an option's value: TensorRT's provider takes `True` and `False`, and refuses `1`."""
    return str(value)
