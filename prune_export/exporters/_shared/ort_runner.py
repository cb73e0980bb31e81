"""Runs a causal language model's graph on ONNX Runtime, its KV cache never leaving the runtime.

Works for any graph with the Hub's names: inputs `input_ids`, `attention_mask`, `position_ids` (the
last two optional) and `past_key_values.{i}.key`/`.value`, outputs `logits` and `present.{i}.key`/
`.value`; of convolutions and recurrences `.conv_state` and `.recurrent_state`, which do not grow.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

import numpy as np

from prune_export.contracts import Placement
from prune_export.errors import MissingExtra, StageError
from prune_export.exporters._shared.ort_providers import (
    NAMES,
    Provider,
    cache_device,
    open_session,
    placement,
)
from prune_export.machine import Machine

_PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value|conv_state|recurrent_state)")
_STATE: Final = "_state"
"""How the names of caches end that do not grow: they start as zeros."""
_DTYPES: Final[Mapping[str, Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
_BFLOAT16: Final = 16  # onnx.TensorProto.BFLOAT16; numpy has no such type


def session_for(
    graph: Path,
    machine: Machine,
    *,
    provider: Provider | None = None,
    prepack: bool = True,
    fuse: bool = True,
    accuracy_level: int | None = None,
    spinning: bool = False,
    library: Path | None = None,
) -> Any:
    """Opens an `onnxruntime.InferenceSession` with this machine's threads.

    None of them spins unless that is asked for: engines that are measured take turns. Without
    `prepack`, weights stay memory-mapped: slower steps, but the session needs hardly more memory
    than its activations. Without `fuse`, the graph is run as it is written: int8 weights are then
    not multiplied with activations that the runtime rounds. `accuracy_level` says what products
    with dequantized weights compute in, as `MatMulNBits` has it. `library` has operators of its
    own: machine code, which runs as soon as it is loaded.

    Raises:
        MissingExtra: onnxruntime is not installed.
        StageError: the graph does not load, or another provider than the one asked for runs it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra.of("ONNX Runtime", "onnxruntime", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = machine.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    if not fuse:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if accuracy_level is not None:
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", str(accuracy_level)
        )
    if library is not None:
        _register(options, library)
    return open_session(graph, provider or Provider(), machine, options)


def _register(options: Any, library: Path) -> None:
    """Makes a library of operators known to a session.

    Raises:
        StageError: it does not load here.
    """
    try:
        options.register_custom_ops_library(str(library.resolve()))
    except Exception as error:  # onnxruntime's own classes share no public base
        raise StageError(
            str(library),
            f"does not load: {str(error).strip().splitlines()[0]}",
            "it is made for one system and processor architecture: export the engine again here",
        ) from error


class OrtRunner:
    """Runs a graph step by step with the KV cache in `OrtValue`s; times the session alone.

    `head_size` is the size of a head in the cache, for graphs that give this dimension a name.
    """

    def __init__(
        self,
        graph: Path,
        machine: Machine,
        *,
        provider: Provider | None = None,
        prepack: bool = True,
        fuse: bool = True,
        head_size: int | None = None,
        accuracy_level: int | None = None,
        spinning: bool = False,
        library: Path | None = None,
    ) -> None:
        self._session = session_for(
            graph, machine, provider=provider, prepack=prepack, fuse=fuse,
            accuracy_level=accuracy_level, spinning=spinning, library=library,
        )  # fmt: skip
        wanted = (provider or Provider()).resolved(machine)
        self._provider = NAMES[wanted]
        self._device = cache_device(wanted)
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self._past = [name for name in self._inputs if _PAST.fullmatch(name)]
        self._head_size = head_size
        self._cache: dict[str, Any] = {}
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._cache, self._session = {}, None

    def placement(self) -> Placement:
        """The provider of each of the graph's nodes, counted."""
        return placement(self._session, self._provider)

    def reset(self) -> None:
        """Empties the KV cache."""
        self._cache, self._seen = {}, 0

    def step(self, ids: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """Runs `ids` int64 `[batch, new]` after the tokens in the cache.

        `mask` int64 `[batch, seen + new]` is 0 where a left-padded prompt has no token. Returns
        logits float32 `[batch, new or 1, vocab]` and the seconds that the session took, without the
        copy of the logits from a GPU.
        """
        batch, new = ids.shape
        total = self._seen + new
        if mask is None:
            mask = np.ones((batch, total), np.int64)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
        binding = self._session.io_binding()
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name, value in fed.items():
            if name in self._inputs:
                dtype = _DTYPES[self._inputs[name].type]
                binding.bind_cpu_input(name, np.ascontiguousarray(value, dtype=dtype))
        for name, cached in self._pasts(batch):
            binding.bind_ortvalue_input(name, cached)
        for name in self._outputs:
            binding.bind_output(name, self._device)
        start = perf_counter()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        seconds = perf_counter() - start
        found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        self._seen = total
        self._cache = {name: found[_present(name)] for name in self._past}
        return _float32(found["logits"]), seconds

    def _pasts(self, batch: int) -> Iterator[tuple[str, Any]]:
        from onnxruntime import OrtValue

        for name in self._past:
            if name not in self._cache:
                entry = self._inputs[name]
                kind = _DTYPES.get(entry.type, _BFLOAT16)
                if name.endswith(_STATE):
                    self._cache[name] = self._zeros((batch, *map(int, entry.shape[1:])), kind)
                else:
                    shape = (batch, int(entry.shape[1]), 0, int(self._head_size or entry.shape[3]))
                    self._cache[name] = OrtValue.ortvalue_from_shape_and_type(
                        shape, kind, self._device
                    )
            yield name, self._cache[name]

    def _zeros(self, shape: tuple[int, ...], kind: Any) -> Any:
        """A state of zeros; of bfloat16, which numpy lacks, by its bits."""
        from onnxruntime import OrtValue

        if kind == _BFLOAT16:
            bits = np.zeros(shape, np.uint16)
            return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
        return OrtValue.ortvalue_from_numpy(np.zeros(shape, kind), self._device)


def _present(past: str) -> str:
    return past.replace("past_key_values.", "present.", 1)


def _float32(value: Any) -> np.ndarray:
    if value.data_type() == "tensor(bfloat16)":
        from torch.utils.dlpack import from_dlpack

        converted: np.ndarray = from_dlpack(value._ortvalue.to_dlpack()).float().cpu().numpy()
        return converted
    array: np.ndarray = value.numpy()
    return array.astype(np.float32, copy=False)
