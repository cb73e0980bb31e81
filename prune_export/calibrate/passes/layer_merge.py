"""Measures how similar a model's final hidden states stay when layers are merged (LaCo).

A merged model is a chain of layers, each with the norms of one of the dense model's blocks and a
weighted sum of several blocks' matrices. Chains that are tried one after the other differ in few
layers: what comes before the first difference is computed once, and a layer that is a plain block
is that block; nothing is copied.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.streaming.driver import PassDriver, block_bytes
from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Layer:
    """A merged layer: the norms of block `of`, and a weighted sum of several blocks' matrices."""

    of: int
    weights: tuple[tuple[int, float], ...]

    @staticmethod
    def plain(block: int) -> Layer:
        """An unmerged block of the dense model."""
        return Layer(block, ((block, 1.0),))

    @property
    def is_plain(self) -> bool:
        """Whether it is an unmerged block of the dense model."""
        return self == Layer.plain(self.of)

    def tensor(self, checkpoint: Checkpoint, arch: Arch, name: str) -> torch.Tensor:
        """Reads a tensor of block `of`, merged unless it belongs to a norm, in its own dtype."""
        if arch.by_name[name].role.startswith("norm"):
            return checkpoint.read_finite(name)
        prefix = f"{arch.table.on_disk}.{self.of}."
        rest = name.removeprefix(prefix)
        parts = [(f"{arch.table.on_disk}.{block}.{rest}", weight) for block, weight in self.weights]
        if len(parts) == 1 and parts[0][1] == 1.0:
            return checkpoint.read_finite(parts[0][0])
        first = checkpoint.read_finite(parts[0][0])
        total = torch.zeros(first.shape, dtype=torch.float32)
        for part, weight in parts:
            total += weight * checkpoint.read_finite(part).float()
        return total.to(first.dtype)


Chain = tuple[Layer, ...]


class MergeSimilarity:
    """Measures the similarity of merged models to the dense one; a context manager.

    `block_forwards` counts layers that windows went through. With `context.scratch` similarities
    are kept there, so that a search that was killed goes on.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        context: CalibrationContext,
        *,
        arch: Arch | None = None,
    ) -> None:
        self._driver = driver = PassDriver.of(checkpoint, context, arch)
        self.arch = driver.arch
        self.block_forwards = 0
        self.dense: Chain = tuple(Layer.plain(block) for block in range(self.arch.layers))
        self._stack = ExitStack()
        self._layerwise: LayerwiseModel | None = None
        self._loaded: dict[int, Layer] = {}
        self._states: dict[Chain, torch.Tensor] = {}
        self._known: dict[Chain, float] = {}
        self._file = None
        if context.scratch is not None:
            self._file = driver.folder("folded", "folded-1").path.with_suffix(".json")
            self._load()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._driver.computing())
        self._task = self._stack.enter_context(self._driver.context.told.task("Folding layers"))
        return self

    def __exit__(self, *raised: object) -> None:
        self._states.clear()
        self._layerwise = None
        self._stack.close()

    def similarity(self, chain: Chain, *, keep: Iterable[Chain] = ()) -> float:
        """The mean over windows of the cosine of final hidden states, dense against merged.

        A window's states count as one vector. `keep` are chains that the next ones will start
        like: their states are kept.
        """
        if chain not in self._known:
            keep = [self.dense, *keep]
            dense = self._last(self.dense, keep)
            found = self._last(chain, keep)
            cosines = torch.nn.functional.cosine_similarity(
                dense.flatten(1).double(), found.flatten(1).double()
            )
            self._known[chain] = float(cosines.mean())
            self._save()
        return self._known[chain]

    def _last(self, chain: Chain, keep: Collection[Chain]) -> torch.Tensor:
        """The final hidden states of a chain, after the last norm."""
        layerwise = self._started()
        at = next(i for i in range(len(chain), -1, -1) if chain[:i] in self._states)
        states = self._states[chain[:at]]
        for place in range(at, len(chain)):
            states = self._run(layerwise, chain[place], states)
            passed = chain[: place + 1]
            if any(one[: place + 1] == passed for one in keep):
                self._states[passed] = states
        for known in list(self._states):
            if not any(one[: len(known)] == known for one in keep):
                del self._states[known]
        norm = self.arch.final_norm
        return states if norm is None else layerwise.model.get_submodule(norm)(states)

    def _run(self, layerwise: LayerwiseModel, layer: Layer, states: torch.Tensor) -> torch.Tensor:
        self._place(layerwise, layer)
        self.block_forwards += 1
        self._task.advance()
        return torch.cat(
            [
                layerwise.run(layer.of, part, self._calls[layer.of])
                for part in torch.split(states, self._driver.batch())
            ]
        )

    def _place(self, layerwise: LayerwiseModel, layer: Layer) -> None:
        """Loads a layer into the block whose norms it has; others go where memory is short."""
        if self._loaded.get(layer.of) == layer:
            return
        for other in list(self._loaded):
            if len(self._loaded) >= self._most:
                layerwise.free(other)
                del self._loaded[other]
        tensors = {
            tensor.name: layer.tensor(self._driver.checkpoint, self.arch, tensor.name)
            for tensor in self.arch.block(layer.of)
        }
        layerwise.load(layer.of, layerwise.converted(tensors))
        self._loaded[layer.of] = layer

    def _started(self) -> LayerwiseModel:
        if self._layerwise is None:
            driver, machine = self._driver, self._driver.context.machine
            made = driver.layerwise()
            made.look_up(driver.ids.flatten())
            self._calls = made.calls(driver.ids)
            self._states[()] = made.enter(driver.ids)
            made.forget_rows()
            memory = machine.gpu_bytes if driver.device == "cuda" else machine.ram_bytes
            self._most = max(1, memory // 2 // block_bytes(self.arch, driver.dtype))
            self._layerwise = made
        return self._layerwise

    def _load(self) -> None:
        if self._file is not None and self._file.exists():
            rows: Sequence[Any] = json.loads(self._file.read_text(encoding="utf-8"))
            for chain, similarity in rows:
                layers = (
                    Layer(of, tuple((block, weight) for block, weight in weights))
                    for of, weights in chain
                )
                self._known[tuple(layers)] = similarity

    def _save(self) -> None:
        if self._file is None:
            return
        rows = [
            [[[layer.of, layer.weights] for layer in chain], similarity]
            for chain, similarity in self._known.items()
        ]
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(rows), encoding="utf-8")
        partial.replace(self._file)
