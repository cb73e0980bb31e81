"""Runs an engine on the GPU, with the KV cache in two buffers there that take turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

import numpy as np
import torch

from prune_export.errors import StageError
from prune_export.exporters.tensorrt.binding import Binding, Flavor
from prune_export.exporters.tensorrt.build import opened_engine
from prune_export.exporters.tensorrt.log import Log, logger_for
from prune_export.exporters.tensorrt.profiles import DECODE, PREFILL
from prune_export.machine import Machine

_DTYPES: Final = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
}


class Gpu:
    """The GPU that an engine runs on, and its CUDA stream."""

    device: Final = "cuda"

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def queue(self) -> int:
        """The stream, as the library wants it."""
        return int(self._stream.cuda_stream)

    def copy(self, value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """Copies an array to the GPU, in the order of the stream."""
        with torch.cuda.stream(self._stream):
            return torch.from_numpy(value).to(self.device, dtype=dtype)

    def wait(self) -> None:
        """Waits until all work in the stream is done."""
        self._stream.synchronize()


class TrtRunner:
    """Runs an engine step by step, with the KV cache on the GPU; times the engine alone.

    `context` and `sequences` are the numbers of tokens and of sequences that it was built for. A
    step's seconds hold the way of its ids to the GPU and the engine's work, not the way of the
    logits back.
    """

    def __init__(
        self,
        engine: Path,
        machine: Machine,
        *,
        flavor: Flavor,
        context: int,
        sequences: int,
        host_code: bool,
    ) -> None:
        if machine.device != "cuda":
            raise StageError(
                str(engine),
                "is for an NVIDIA GPU, and there is none (or `--device cpu` hides it)",
                "verify it on the machine that it was built for, with "
                "`prune-export verify DIRECTORY --trust-engine`",
            )
        self.most_sequences = sequences
        self._start(Binding.load(flavor), engine, Gpu(), context=context, host_code=host_code)

    def _start(
        self, binding: Binding, engine: Path, gpu: Gpu, *, context: int, host_code: bool
    ) -> None:
        self._binding = binding
        self._log = Log()
        self._logger = logger_for(self._binding.module, self._log)
        self._engine = opened_engine(self._binding, engine, self._log, self._logger, host_code)
        self._path = engine
        self._limit = context
        self._gpu = gpu
        self._inputs, self._outputs = self._tensors()
        self._caches = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._contexts: dict[int, Any] = {}
        self._buffers: dict[str, list[torch.Tensor]] = {}
        self._batch = 0
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._gpu.wait()
        self._contexts.clear()
        self._buffers.clear()
        self._engine = None

    def reset(self) -> None:
        """Empties the KV cache; its buffers stay."""
        self._seen = 0

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Feeds `ids` int64 `[batch, new]` after what the cache holds.

        Returns logits float32 `[batch, new or 1, vocab]` and the seconds that the engine took.

        Raises:
            StageError: it was built for fewer sequences or tokens, or fails.
        """
        batch, new = ids.shape
        total = self._seen + new
        if total > self._limit:
            raise StageError(
                str(self._path),
                f"got {total} tokens, but it was built for {self._limit}",
                f"export it with `context: {{best: {total}, most: {total}}}`",
            )
        self._make_room(batch)
        context = self._context(DECODE if new == 1 and self._seen else PREFILL)
        positions = np.tile(np.arange(self._seen, total), (batch, 1))
        fed = {
            "input_ids": ids,
            "attention_mask": np.ones((batch, total), np.int64),
            "position_ids": positions,
        }
        start = perf_counter()
        held = [self._feed(context, name, value) for name, value in fed.items()]
        self._bind_caches(context, batch)
        logits = self._output(context, "logits")
        if not context.execute_async_v3(self._gpu.queue):
            raise self._failed("could not be started")
        self._gpu.wait()
        seconds = perf_counter() - start
        del held
        for pair in self._buffers.values():
            pair.reverse()
        self._seen = total
        return logits.float().cpu().numpy(), seconds

    def _tensors(self) -> tuple[dict[str, torch.dtype], dict[str, torch.dtype]]:
        """The engine's inputs and outputs, with their types."""
        inputs: dict[str, torch.dtype] = {}
        outputs: dict[str, torch.dtype] = {}
        read = self._binding.module.TensorIOMode.INPUT
        for at in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(at)
            side = inputs if self._engine.get_tensor_mode(name) == read else outputs
            side[name] = _DTYPES[self._engine.get_tensor_dtype(name).name]
        return inputs, outputs

    def _context(self, profile: int) -> Any:
        """The execution context of a profile; each has its own, so that none is switched."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context(*self._settings(profile))
            if context is None:
                raise self._failed("finds no memory to run in")
            if not context.set_optimization_profile_async(profile, self._gpu.queue):
                raise self._failed(f"has no profile {profile}")
            self._gpu.wait()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _settings(self, profile: int) -> Iterator[Any]:
        """Configures TensorRT-RTX not to compile kernels beside what is being timed.

        A prompt's shape comes again and gets kernels of its own, at once. A decode step's cache has
        a new shape each time, for which there are kernels that fit any.
        """
        if self._binding.features.compiles_at_start:
            settings = self._engine.create_runtime_config()
            kinds = self._binding.module.DynamicShapesKernelSpecializationStrategy
            kind = kinds.NONE if profile == DECODE else kinds.EAGER
            settings.dynamic_shapes_kernel_specialization_strategy = kind
            yield settings

    def _make_room(self, batch: int) -> None:
        """Allocates two buffers for each part of the cache, as long as the context."""
        if self._seen and batch != self._batch:
            raise StageError(
                str(self._path),
                f"got {batch} sequences after {self._batch}",
                "call `reset` before another batch",
            )
        if batch == self._batch:
            return
        self._batch = batch
        self._buffers.clear()
        for name in self._caches:
            _, heads, _, size = self._engine.get_tensor_shape(name)
            room = batch * heads * self._limit * size
            self._buffers[name] = [
                torch.empty(room, dtype=self._inputs[name], device=self._gpu.device)
                for _ in range(2)
            ]

    def _feed(self, context: Any, name: str, value: np.ndarray) -> torch.Tensor | None:
        if name not in self._inputs:
            return None
        tensor = self._gpu.copy(np.array(value), self._inputs[name])
        self._shape(context, name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def _bind_caches(self, context: Any, batch: int) -> None:
        for name, (past, present) in self._buffers.items():
            _, heads, _, size = self._engine.get_tensor_shape(name)
            self._shape(context, name, (batch, heads, self._seen, size))
            context.set_tensor_address(name, past.data_ptr())
            written = name.replace("past_key_values.", "present.", 1)
            context.set_tensor_address(written, present.data_ptr())

    def _shape(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(name, shape):
            raise StageError(
                f"{self._path}  {name}",
                f"got shape {list(shape)}, outside of what the engine was built for",
                "export it with larger `batch`, `prompt` or `context`",
            )

    def _output(self, context: Any, name: str) -> torch.Tensor:
        shape = tuple(context.get_tensor_shape(name))
        made = torch.empty(shape, dtype=self._outputs[name], device=self._gpu.device)
        context.set_tensor_address(name, made.data_ptr())
        return made

    def _failed(self, what: str) -> StageError:
        told = self._log.faults[0].strip()[:500] if self._log.faults else "it gives no reason"
        return StageError(
            str(self._path),
            f"{what}: {told}",
            "close other programs on the GPU, or export it with a smaller `context` or `batch`",
        )
