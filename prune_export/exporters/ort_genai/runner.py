"""Runs the builder's graph directly on ONNX Runtime, its KV cache updated in place.

The graph's attention appends to the cache in place when past and present are one buffer; that
saves copying the cache at every step. `OgRunner` runs the same files through onnxruntime-genai.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any, Final, Self

import numpy as np

from prune_export.contracts import Placement, Runner
from prune_export.errors import CheckpointError
from prune_export.exporters._shared.ort_providers import NAMES, Provider, placement
from prune_export.exporters._shared.ort_runner import OrtRunner, session_for
from prune_export.kernels.compiling import LIBRARY
from prune_export.machine import Machine
from prune_export.system.files import read_json_object

GRAPH: Final = "model.onnx"
CONFIG: Final = "genai_config.json"
PROVIDER: Final = Provider("cpu")
_LARGEST_HEAD: Final = 65_536
_ROOM: Final = 256  # positions by which a full cache grows


def name_library(path: Path) -> None:
    """Names the kernel of packed weights in genai_config.json, from where the runtime loads it."""
    file = path / CONFIG
    config = read_json_object(file, "onnxruntime-genai's configuration of an engine")
    config["model"]["decoder"].setdefault("session_options", {})["custom_ops_library"] = LIBRARY
    file.write_text(json.dumps(config, indent=4), encoding="utf-8")


def open_runner(
    path: Path, machine: Machine, *, library: Path | None = None, spinning: bool = False
) -> Runner:
    """Opens the builder's graph in `path` on the CPU.

    fp16 graphs have no attention that appends in place; their cache is handed on instead.
    `library` has operators of the graph that the runtime lacks.
    """
    shared, head_size = _read_config(path)
    if shared:
        return GenaiRunner(path, machine, library, spinning=spinning)
    return OrtRunner(
        path / GRAPH, machine, provider=PROVIDER, head_size=head_size, spinning=spinning,
        library=library,
    )  # fmt: skip


def _read_config(path: Path) -> tuple[bool, int]:
    """Reads genai_config.json: whether the cache is appended to in place, and the head size.

    Raises:
        CheckpointError: the directory's genai_config.json does not say so, or not with such values.
    """
    file = path / CONFIG
    config = read_json_object(file, "onnxruntime-genai's configuration of an engine")
    try:
        shared = config["search"]["past_present_share_buffer"]
        head_size = config["model"]["decoder"]["head_size"]
    except (KeyError, TypeError, IndexError):
        shared = head_size = None
    if type(shared) is not bool or type(head_size) is not int or not 0 < head_size <= _LARGEST_HEAD:
        raise CheckpointError(
            str(file),
            f"got past_present_share_buffer {shared!r:.40} and head_size {head_size!r:.40}, "
            f"expected a yes or no and a size up to {_LARGEST_HEAD}",
            "export the engine again",
        )
    return shared, head_size


class GenaiRunner:
    """Runs the graph step by step, with the KV cache in buffers that the graph writes into."""

    def __init__(
        self, path: Path, machine: Machine, library: Path | None = None, *, spinning: bool = False
    ) -> None:
        self._session = session_for(
            path / GRAPH, machine, provider=PROVIDER, spinning=spinning, library=library
        )
        self._head_size = _read_config(path)[1]
        # Blocks may have different numbers of heads.
        self._past = {
            entry.name: int(entry.shape[1])
            for entry in self._session.get_inputs()
            if entry.name.startswith("past_key_values.")
        }
        logits = next(e for e in self._session.get_outputs() if e.name == "logits")
        self._vocab, self._last = int(logits.shape[2]), logits.shape[1] == 1
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.reset()
        self._session = None

    def placement(self) -> Placement:
        """The provider of each of the graph's nodes, counted."""
        return placement(self._session, NAMES["cpu"])

    def reset(self) -> None:
        """Forgets the cache."""
        self._binding: Any = None
        self._buffers: list[np.ndarray] = []
        self._logits = np.empty((0, 0, 0), np.float32)
        self._batch = self._seen = 0

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Feeds `ids` int64 `[batch, new]` after what the cache holds.

        Returns logits float32 `[batch, new or 1, vocab]` and the seconds that it took, those for
        feeding and growing the cache included.
        """
        batch, new = ids.shape
        if batch > 1 and new > 1 and self._seen:
            # The attention continues several sequences by one token at a time only.
            parts = [self.step(ids[:, i : i + 1]) for i in range(new)]
            kept = parts[-1:] if self._last else parts
            return np.concatenate([part[0] for part in kept], axis=1), sum(p[1] for p in parts)
        start = perf_counter()
        total = self._seen + new
        self._make_room(batch, total)
        binding = self._binding
        fed = np.ascontiguousarray(ids, np.int64)
        mask = np.ones((batch, total), np.int64)
        binding.bind_cpu_input("input_ids", fed)
        binding.bind_cpu_input("attention_mask", mask)
        self._bind_logits(batch, 1 if self._last else new)
        self._session.run_with_iobinding(binding)
        self._seen = total
        seconds = perf_counter() - start
        return self._logits.copy(), seconds

    def _bind_logits(self, batch: int, positions: int) -> None:
        shape = (batch, positions, self._vocab)
        if self._logits.shape != shape:
            self._logits = np.empty(shape, np.float32)
            self._binding.bind_ortvalue_output("logits", _value_over(self._logits))

    def _make_room(self, batch: int, total: int) -> None:
        capacity = self._buffers[0].shape[2] if self._buffers else 0
        if self._buffers and total <= capacity:
            return
        room = total + _ROOM - total % _ROOM
        self._binding = self._session.io_binding()
        self._logits = np.empty((0, 0, 0), np.float32)
        grown = []
        for index, (name, heads) in enumerate(self._past.items()):
            buffer = np.zeros((batch, heads, room, self._head_size), np.float32)
            if self._seen:
                buffer[:, :, : self._seen] = self._buffers[index][:, :, : self._seen]
            value = _value_over(buffer)
            self._binding.bind_ortvalue_input(name, value)
            present = name.replace("past_key_values", "present", 1)
            self._binding.bind_ortvalue_output(present, value)
            grown.append(buffer)
        self._buffers = grown


class OgRunner:
    """Runs the same files through onnxruntime-genai's own runtime, to compare with it.

    A runner as well: `step` feeds given tokens, `generate` takes the runtime's own greedy choices.
    Batch 1; `capacity` is the cache's length in positions.
    """

    def __init__(self, path: Path, machine: Machine, *, capacity: int = 1024) -> None:
        import onnxruntime_genai as og

        if hasattr(og, "disable_telemetry_events"):
            og.disable_telemetry_events()
        config = og.Config(str(path))
        options = {
            "intra_op_num_threads": machine.threads,
            "session.intra_op.allow_spinning": "0",
        }
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._og, self._capacity = og, capacity
        self._model: Any = og.Model(config)
        self._generator: Any = None
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._generator = self._model = None

    def reset(self) -> None:
        """Forgets the cache."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._capacity, do_sample=False)
        self._generator = self._og.Generator(self._model, params)

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Feeds `ids` `[1, new]`; see `GenaiRunner.step`."""
        fed = np.ascontiguousarray(ids, np.int32)
        start = perf_counter()
        self._generator.append_tokens(fed)
        logits = self._generator.get_logits()
        seconds = perf_counter() - start
        return np.asarray(logits, np.float32), seconds

    def generate(self, prompt: np.ndarray, new: int) -> list[int]:
        """Generates `new` tokens after `prompt` `[1, length]`; fewer where the text ends."""
        self.reset()
        self._generator.append_tokens(np.ascontiguousarray(prompt, np.int32))
        tokens: list[int] = []
        while len(tokens) < new and not self._generator.is_done():
            self._generator.generate_next_token()
            tokens.append(int(self._generator.get_next_tokens()[0]))
        return tokens


def _value_over(array: np.ndarray) -> Any:
    from onnxruntime import OrtValue

    return OrtValue.ortvalue_from_numpy(array, "cpu")
