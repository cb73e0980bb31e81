"""Builds an engine from a graph with the installed TensorRT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune_export.errors import StageError
from prune_export.exporters.tensorrt.binding import Binding
from prune_export.exporters.tensorrt.layers import Layer, layers_of
from prune_export.exporters.tensorrt.log import Log, logger_for
from prune_export.exporters.tensorrt.profiles import Sizes


@dataclass(frozen=True)
class Settings:
    """Build settings; `target` is a GPU to build ahead for, such as `sm89`, None for this one."""

    sizes: Sizes
    sparse: bool
    version_compatible: bool
    target: str | None


def build(
    binding: Binding, graph: Path, settings: Settings, engine: Path, cache: Path, log: Log
) -> None:
    """Builds the engine of `graph` into the file `engine`; `cache` is its timing cache.

    Raises:
        StageError: the library does not take the graph, or found no way to run it.
    """
    logger = logger_for(binding.module, log)
    builder = binding.module.Builder(logger)
    network = builder.create_network(_flags(binding))
    _parse(binding, network, logger, graph, log)
    config = builder.create_builder_config()
    _configure(binding, config, settings)
    for shapes in settings.sizes.profiles(dict(_inputs(network))):
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    timed = None
    if binding.features.timing_cache:
        before = cache.read_bytes() if cache.is_file() else b""
        timed = config.create_timing_cache(before)  # held here: it must outlive the build
        config.set_timing_cache(timed, False)
    built = builder.build_serialized_network(network, config)
    if built is None or not built.nbytes:
        raise _refused(graph, log, "found no way to run the graph")
    with engine.open("wb") as stream:
        stream.write(memoryview(built))
    if timed is not None:
        cache.write_bytes(memoryview(timed.serialize()))


def inspected(binding: Binding, engine: Path, *, host_code: bool) -> tuple[str, tuple[Layer, ...]]:
    """Inspects an engine's layers: the library's JSON, and its parsed form; needs the GPU.

    `host_code` lets an engine for several versions bring its own runtime: only for our own ones.

    Raises:
        StageError: the engine does not load on this machine.
    """
    log = Log()
    opened = opened_engine(binding, engine, log, logger_for(binding.module, log), host_code)
    inspector = opened.create_engine_inspector()
    told = inspector.get_engine_information(binding.module.LayerInformationFormat.JSON)
    return str(told), layers_of(told)


def opened_engine(binding: Binding, engine: Path, log: Log, logger: Any, host_code: bool) -> Any:
    """Opens an engine file on this machine's GPU.

    Raises:
        StageError: it does not load.
    """
    runtime = binding.module.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    opened = runtime.deserialize_cuda_engine(engine.read_bytes())
    if opened is None:
        raise StageError(
            str(engine),
            f"{_name(binding)} does not load it: {_why(log, 'it gives no reason')}",
            "engines run on the GPU model and library version that they were built for: "
            "export it again on this machine",
        )
    return opened


def _flags(binding: Binding) -> int:
    if not binding.features.says_strongly_typed:
        return 0
    return 1 << int(binding.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _parse(binding: Binding, network: Any, logger: Any, graph: Path, log: Log) -> None:
    parser = binding.module.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        told = [parser.get_error(at).desc() for at in range(parser.num_errors)]
        log.add("ERROR", "; ".join(told))
        raise _refused(graph, log, "cannot read the graph")


def _configure(binding: Binding, config: Any, settings: Settings) -> None:
    module = binding.module
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if settings.sparse:
        config.set_flag(module.BuilderFlag.SPARSE_WEIGHTS)
    if settings.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if binding.features.builds_ahead:
        kinds = module.ComputeCapability
        target = getattr(kinds, settings.target.upper()) if settings.target else kinds.CURRENT
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)


def _inputs(network: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    for at in range(network.num_inputs):
        tensor = network.get_input(at)
        yield tensor.name, tuple(tensor.shape)


def _refused(graph: Path, log: Log, what: str) -> StageError:
    return StageError(
        f"tensorrt: {graph.name}",
        f"the builder {what}: {_why(log, 'it gives no reason')}",
        "the build log is kept beside the graph; try `precision: fp16`, or export with `onnx`",
    )


def _why(log: Log, otherwise: str) -> str:
    return " ".join(" ".join(log.faults).split())[:600] if log.faults else otherwise


def _name(binding: Binding) -> str:
    return f"{'TensorRT-RTX' if binding.flavor == 'rtx' else 'TensorRT'} {binding.version}"
