"""Computes the gradient of the loss by every weight, with one block in memory at a time.

Forward, the inputs of each block are written to files. Backward, from the last block to the first,
each block is computed again from them and the gradient passes through it. What is made of a block's
gradients is up to a reader: it may keep them, or only a score for each channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal, Protocol

import torch

from prune_export.arch import Arch, Tensor
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.streaming.block_loader import loaded
from prune_export.calibrate.streaming.checkpointing import Saves
from prune_export.calibrate.streaming.driver import PassDriver, batches
from prune_export.calibrate.streaming.layerwise_model import Call
from prune_export.calibrate.streaming.linear_groups import as_matrix, linears, part_of
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.checkpoint import Checkpoint
from prune_export.progress import Progress, Task

Kind = Literal["sum", "abs", "square"]
"""Over windows, each with the gradient g of its own mean-token loss: sum g, sum |g|, sum g^2."""

Sums = Mapping[str, Mapping[Kind, torch.Tensor]]
"""For each wanted parameter of a block, by its name in the block: float32 sums of its shape."""


class GradientReader(Protocol):
    """Reduces gradients: says which are wanted, and what is kept of those of a block."""

    @property
    def key(self) -> str:
        """JSON that identifies the reader: a killed pass goes on only with an equal one."""

    @property
    def kinds(self) -> tuple[Kind, ...]: ...

    def wants(self, layer: int, name: str) -> bool:
        """Whether the gradient of a parameter, by its name in the block, is wanted."""

    def keep(
        self, layer: int, sums: Sums, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """Turns a block's summed gradients into what is kept: tensors by names of its choice.

        Asked only of blocks of which a gradient is wanted.
        """


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a reader kept of each block, in files; `loss` is the mean loss in nats a token.

    Of blocks below `first` no gradient was wanted, and none was computed. `names` has the parameter
    in its block that each stored matrix is, or is a part of.
    """

    folder: Path
    layers: int
    loss: float
    names: Mapping[str, str]
    first: int = 0

    def block(self, layer: int) -> dict[str, torch.Tensor]:
        """Loads what was kept of one block."""
        from safetensors.torch import load_file

        return dict(load_file(self.folder / f"{layer}.safetensors"))

    def matrix(self, tensor: Tensor) -> torch.Tensor:
        """Loads what was kept by the name and in the shape of a weight matrix, as `[out, in]`."""
        from safetensors import safe_open

        with safe_open(self.folder / f"{tensor.layer}.safetensors", framework="pt") as file:
            kept = file.get_slice(self.names[tensor.name])
            # Of a block's experts, which are one parameter, no other is read.
            at = slice(None) if tensor.expert is None else slice(tensor.expert, tensor.expert + 1)
            whole = kept[at]
        own = tensor if tensor.expert is None else replace(tensor, expert=0)
        return as_matrix(tensor, part_of(own, whole))


def gradients(
    checkpoint: Checkpoint,
    reader: GradientReader,
    context: CalibrationContext,
    *,
    arch: Arch | None = None,
) -> Gradients:
    """Computes the gradients of the next-token loss over the windows; `reader` says what is kept.

    In float32 on a CPU, where each weight's gradient equals that of plain autograd on the whole
    model; in bfloat16 states and float32 sums on a GPU. With `context.scratch`, a pass that is
    killed goes on from there, and ends in the same bytes.

    Raises:
        PlanError: the windows are longer than the model's positions, or hold ids it doesn't know.
    """
    driver = PassDriver.of(checkpoint, context, arch)
    arch, made_in = driver.arch, driver.folder("gradients", reader.key, reader.kinds)
    folder = made_in.path
    with driver.computing(gradients=True):
        a_pass = _Pass(driver, reader, Saves(folder))
        a_pass.run(context.told)
    loss = json.loads((folder / "loss.json").read_text(encoding="utf-8")) / context.tokens.samples
    names = {tensor.name: a_pass.layerwise.name_in_block(tensor) for tensor in linears(arch)}
    found = Gradients(folder, arch.layers, loss, names, a_pass.first)
    made_in.live_as_long_as(found)
    return found


_BACKWARD: Final = 3
"""A backward step computes the block again and twice as much for the gradients."""


class _Pass:
    def __init__(self, driver: PassDriver, reader: GradientReader, saves: Saves) -> None:
        self.arch, self.reader, self.ids, self.saves = driver.arch, reader, driver.ids, saves
        self.dtype, self.batch = driver.dtype, driver.batch()
        self.layerwise = driver.layerwise()
        wanted = (layer for layer in range(self.arch.layers) if self._wanted(layer))
        self.first = next(wanted, self.arch.layers)
        """The first block of which a gradient is wanted: there the way back ends."""

    def _wanted(self, layer: int) -> dict[str, torch.nn.Parameter]:
        parameters = self.layerwise.parameters(layer)
        return {name: one for name, one in parameters.items() if self.reader.wants(layer, name)}

    def run(self, progress: Progress) -> None:
        """Runs from the last save to the end; a step is a block, forward or backward."""
        layers, all_tokens, first = self.arch.layers, self.ids.numel(), self.first
        steps = layers + _BACKWARD * (layers - first)
        with progress.task("Gradients", all_tokens * steps) as task:
            done = self.saves.done()
            forward, back = min(done, layers), max(0, done - layers)
            task.advance(all_tokens * (forward + _BACKWARD * back))
            if done == 2 * layers - first and (self.saves.folder / "loss.json").exists():
                return
            self.layerwise.look_up(self.ids.flatten())
            calls = self.layerwise.calls(self.ids)
            if not done:
                with self._file(0) as states:
                    for start, stop in self._batches(self.batch):
                        states.write(start, self.layerwise.enter(self.ids[start:stop]))
            self.layerwise.forget_rows()
            for layer in loaded(self.layerwise, range(forward, layers)):
                self._forward(layer, calls[layer], task)
                self.saves.save(layer + 1, {}, {})
            if not back:
                self._loss()
            for layer in loaded(self.layerwise, reversed(range(first, layers - back))):
                self._backward(layer, calls[layer], task)
                self.saves.save(2 * layers - layer, {}, {})
                self._path(layer + 1).unlink(missing_ok=True)
                self._path(layer + 1, "by").unlink(missing_ok=True)
        for layer in range(first + 1):
            self._path(layer).unlink(missing_ok=True)
            self._path(layer, "by").unlink(missing_ok=True)

    def _forward(self, layer: int, call: Call, task: Task) -> None:
        with self._file(layer) as states, self._file(layer + 1) as following:
            for start, stop in self._batches(self.batch):
                inputs = states.read(start, stop).to(self.layerwise.device)
                following.write(start, self.layerwise.run(layer, inputs, call))
                task.advance(inputs.shape[0] * inputs.shape[1])

    def _loss(self) -> None:
        self.layerwise.load_head()
        total, last = 0.0, self.arch.layers
        with self._file(last) as states, self._file(last, "by") as gradient:
            for start, stop in self._batches(1):
                loss, found = self.layerwise.loss_gradient(
                    states.read(start, stop), self.ids[start:stop]
                )
                gradient.write(start, found)
                total += loss
        (self.saves.folder / "loss.json").write_text(json.dumps(total), encoding="utf-8")
        self.layerwise.free_head()

    def _backward(self, layer: int, call: Call, task: Task) -> None:
        from safetensors.torch import save_file

        wanted = self._wanted(layer)
        for one in wanted.values():
            one.requires_grad_()
        kinds = self.reader.kinds
        sums: dict[str, dict[Kind, torch.Tensor]] = {
            name: {kind: torch.zeros_like(one, dtype=torch.float32) for kind in kinds}
            for name, one in wanted.items()
        }
        # Where only the sum is wanted, windows need not be told apart.
        together = self.batch if kinds == ("sum",) else 1
        with (
            self._file(layer) as states,
            self._file(layer + 1, "by") as above,
            self._file(layer, "by") as below,
        ):
            for start, stop in self._batches(together):
                inputs = states.read(start, stop).to(self.layerwise.device)
                further = [inputs.requires_grad_()] if layer > self.first else []
                with torch.enable_grad():
                    outputs = self.layerwise.run(layer, inputs, call)
                by = above.read(start, stop).to(self.layerwise.device)
                # What only chooses experts (a router's correction) has a gradient of zero.
                found = torch.autograd.grad(
                    outputs, [*wanted.values(), *further], by, materialize_grads=True
                )
                for name, gradient in zip(wanted, found[: len(wanted)], strict=True):
                    _add(sums[name], gradient.float())
                if further:
                    below.write(start, found[-1])
                task.advance(_BACKWARD * inputs.shape[0] * inputs.shape[1])
        if not wanted:
            return
        parameters = self.layerwise.parameters(layer)
        values = {name: one.detach() for name, one in parameters.items()}
        kept = self.reader.keep(layer, sums, values)
        own_bytes = {name: tensor.contiguous().cpu() for name, tensor in kept.items()}
        save_file(own_bytes, self.saves.folder / f"{layer}.safetensors")

    def _file(self, layer: int, name: str = "") -> Buffer:
        samples, length = self.ids.shape
        shape = (length, self.arch.sizes["residual"])
        return Buffer(samples, shape, self.dtype, path=self._path(layer, name))

    def _path(self, layer: int, name: str = "") -> Path:
        return self.saves.folder / f"{layer}{name}.spool"

    def _batches(self, size: int) -> Iterator[tuple[int, int]]:
        return batches(len(self.ids), size)


def _add(sums: Mapping[Kind, torch.Tensor], gradient: torch.Tensor) -> None:
    for kind, total in sums.items():
        if kind == "sum":
            total += gradient
        elif kind == "abs":
            total += gradient.abs()
        else:
            total.addcmul_(gradient, gradient)


def offloaded_bytes(arch: Arch, tokens: int, dtype: torch.dtype) -> int:
    """The disk bytes of a pass over `tokens`: the inputs of every block, and two gradients."""
    return (arch.layers + 3) * tokens * arch.sizes["residual"] * dtype.itemsize
