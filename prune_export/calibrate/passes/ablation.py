"""Measures the loss of a model without some of its blocks, or without their attention or MLP.

Searches ask for many such models, most of which are alike up to some block: the states that enter a
block depend only on what is removed before it. Each such state is computed once for all models that
share it, and those that the next question will need again are kept. What a model costs is then the
blocks after its first difference. Blocks stay loaded where the whole model fits in memory; where it
does not, all models that are asked for together pass through one block after the other.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import psutil
import torch

from prune_export.arch import Arch
from prune_export.calibrate.context import CalibrationContext
from prune_export.calibrate.streaming.block_loader import loaded
from prune_export.calibrate.streaming.driver import PassDriver, block_bytes
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.calibrate.streaming.skip import Part, Unit, skipped
from prune_export.checkpoint import Checkpoint
from prune_export.machine import Machine

Removed = tuple[Unit, ...]
"""What a model goes without, in the order of the model."""

_Place = tuple[int, int, Removed]
"""A chunk of windows, the block that it is about to enter, and what was removed before that."""

_CHUNKS: Final = 4
"""The least number of chunks, where there are as many windows."""

_RESIDENT: Final = 0.5
"""The share of memory that a whole model may take to stay loaded."""


class Ablations:
    """Measures losses of one model with units removed (a unit is a block, attention or MLP).

    A context manager.

    The windows are scored in chunks, so that a few of them may be asked first. With
    `context.scratch` every measured loss is kept there: a search that was killed asks again, is
    answered at once, and goes on. `block_forwards` and `head_forwards` count the chunks that went
    through a block and the head. In `dtype`, by default that of a calibration pass.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        context: CalibrationContext,
        *,
        arch: Arch | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._driver = driver = PassDriver.of(checkpoint, context, arch, dtype)
        self.arch, self.dtype = driver.arch, driver.dtype
        self.block_forwards = self.head_forwards = 0
        self._stack = ExitStack()
        folder = driver.folder("removals", "removals-1", str(self.dtype))
        self._stack.callback(folder.close)
        self._folder = folder.path
        self._folder.mkdir(parents=True, exist_ok=True)
        size = min(driver.batch(), -(-context.tokens.samples // _CHUNKS))
        self._ids = torch.split(driver.ids, size)
        self._kept: dict[_Place, Buffer] = {}
        self._losses = _Losses(self._folder / "losses.json")
        self._model: _Model | None = None

    @property
    def chunks(self) -> int:
        """The number of chunks into which the windows are cut."""
        return len(self._ids)

    def __enter__(self) -> Self:
        self._stack.enter_context(self._driver.computing())
        return self

    def __exit__(self, *raised: object) -> None:
        if self._model is not None:
            for states in self._kept.values():
                self._model.free(states)
        self._kept.clear()
        self._model = None
        self._stack.close()

    def losses(
        self,
        models: Sequence[Collection[Unit]],
        *,
        chunks: int | None = None,
        keep: Iterable[Collection[Unit]] = (),
    ) -> list[float]:
        """The mean next-token loss in nats for each of `models`, which are sets of removed units.

        Measured on the first `chunks` chunks, or on all. `keep` are the models from which later
        ones will be made: their hidden states are kept.
        """
        asked = [in_order(model) for model in models]
        count = min(chunks or self.chunks, self.chunks)
        ways = {in_order(model) for model in keep}
        ends = {
            (chunk, self.arch.layers, model)
            for model in asked
            for chunk in range(count)
            if (chunk, model) not in self._losses.by
        }
        runs, uses = self._plan(ends)
        self._forget(ways, uses)
        if ends:
            self._measure(ends, runs, uses, ways)
        predicted = sum(len(ids) * (ids.shape[1] - 1) for ids in self._ids[:count])
        return [
            sum(self._losses.by[chunk, model] for chunk in range(count)) / predicted
            for model in asked
        ]

    def _forget(self, ways: Collection[Removed], used: Collection[_Place]) -> None:
        """Frees all states but those on `ways`, those `used`, and the input of the first block."""
        for place in list(self._kept):
            _, layer, gone = place
            on_way = any(before(way, layer) == gone for way in ways)
            if self._model and layer and not on_way and place not in used:
                self._model.free(self._kept.pop(place))

    def _measure(
        self,
        ends: Collection[_Place],
        runs: Mapping[int, Sequence[_Place]],
        uses: Counter[_Place],
        ways: Collection[Removed],
    ) -> None:
        """Computes the losses at `ends` by way of `runs`."""
        if self._model is None:
            self._model = _Model(self._driver, self._ids, self._folder)
        model = self._model
        passing: dict[_Place, Buffer] = {}

        def take(place: _Place) -> torch.Tensor:
            states = model.read(self._kept[place] if place in self._kept else passing[place])
            uses[place] -= 1
            if not uses[place] and place in passing:
                model.free(passing.pop(place))
            return states

        models = len({gone for _, _, gone in ends})
        total = sum(map(len, runs.values())) + len(ends)
        with self._driver.context.told.task(f"Measuring {models} models", total) as task:
            for chunk in {chunk for chunk, _, _ in ends}:
                if (chunk, 0, ()) not in self._kept:
                    self._kept[chunk, 0, ()] = model.enter(self._ids[chunk])
            for layer in model.loaded(sorted(runs)):
                for place in runs[layer]:
                    _, _, gone = place
                    states = model.run(layer, take(_source(place)), _parts(gone, layer))
                    self.block_forwards += 1
                    on_way = any(before(way, layer + 1) == gone for way in ways)
                    (self._kept if on_way or model.has_room else passing)[place] = states
                    task.advance()
            for chunk, layer, gone in sorted(ends):
                last = take(_canonical((chunk, layer, gone)))
                self._losses.by[chunk, gone] = model.loss(last, self._ids[chunk])
                self.head_forwards += 1
                task.advance()
        self._losses.save()

    def _plan(self, ends: Iterable[_Place]) -> tuple[dict[int, list[_Place]], Counter[_Place]]:
        """Plans which states must be computed for `ends`, by block, and how often each is used."""
        uses = Counter(_canonical(end) for end in ends)
        runs: dict[int, list[_Place]] = {}
        for after in range(self.arch.layers, 0, -1):
            here = sorted(place for place in uses if place[1] == after and place not in self._kept)
            if here:
                runs[after - 1] = here
                uses.update(_source(place) for place in here)
        return runs, uses


_AMPERE: Final = 80
"""The first compute capability that multiplies bfloat16."""


def native_dtype(machine: Machine) -> torch.dtype:
    """Chooses bfloat16 where the hardware multiplies it, else float32.

    That is CUDA from Ampere on, and a CPU with AMX or AVX512-BF16. One thread of an EPYC
    with the latter multiplies [1024, 576] and [576, 1536] at 446 GFLOP/s in bfloat16, and at 92 in
    float32.
    """
    if machine.device == "cuda":
        # A machine that is only planned for says what its GPU is; a real one is asked.
        native = (
            machine.capability >= _AMPERE
            if machine.capability
            else torch.cuda.is_bf16_supported(including_emulation=False)
        )
    else:
        asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in asked)
    return torch.bfloat16 if native else torch.float32


def in_order(units: Collection[Unit]) -> Removed:
    """Sorts units by their place in the model, each once."""
    return tuple(sorted(set(units)))


def before(gone: Removed, layer: int) -> Removed:
    """The removed units that the input of a block depends on: those before it."""
    return tuple(unit for unit in gone if unit.layer < layer)


def _canonical(place: _Place) -> _Place:
    """The first place with the same states: where blocks are removed, they stand still."""
    chunk, layer, gone = place
    while layer and Unit(layer - 1, "block") in gone:
        layer -= 1
        gone = before(gone, layer)
    return chunk, layer, gone


def _source(place: _Place) -> _Place:
    """From where a block brings states to a canonical place."""
    chunk, layer, gone = place
    return _canonical((chunk, layer - 1, before(gone, layer - 1)))


def _parts(gone: Removed, layer: int) -> list[Part]:
    return [unit.part for unit in gone if unit.layer == layer]


class _Losses:
    """Keeps the measured losses (summed, by chunk and model), in a file where there is one."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.by: dict[tuple[int, Removed], float] = {}
        if file.exists():
            for chunk, units, loss in json.loads(file.read_text(encoding="utf-8")):
                self.by[chunk, tuple(Unit(*unit) for unit in units)] = loss

    def save(self) -> None:
        rows = [
            [chunk, [[unit.layer, unit.part] for unit in gone], loss]
            for (chunk, gone), loss in self.by.items()
        ]
        partial = self._file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(rows, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)


class _Model:
    """The model, loaded block by block, or whole where it fits in memory; and its hidden states."""

    def __init__(
        self,
        driver: PassDriver,
        chunks: Sequence[torch.Tensor],
        folder: Path,
    ) -> None:
        arch, machine = driver.arch, driver.context.machine
        self.layerwise = driver.layerwise()
        self.layerwise.look_up(torch.cat([ids.flatten() for ids in chunks]))
        self._calls = self.layerwise.calls(chunks[0])
        self.layerwise.load_head()
        block, gpu = block_bytes(arch, driver.dtype), machine.device == "cuda"
        blocks = block * arch.layers
        self._resident = blocks <= _RESIDENT * (machine.gpu_bytes if gpu else machine.ram_bytes)
        self._loaded: set[int] = set()
        held = blocks if self._resident else 3 * block
        used = psutil.Process().memory_info().rss
        self._room: dict[str, int] = {"cpu": machine.ram_bytes - used - (0 if gpu else held)}
        if gpu:
            self._room = {"cuda": machine.gpu_bytes // 2 - held} | self._room
        self._ample = next(iter(self._room.values())) // 2
        self._folder, self._files = folder, 0

    @property
    def has_room(self) -> bool:
        """Whether states may be kept that are not on the way of a model yet."""
        return next(iter(self._room.values())) > self._ample

    def loaded(self, layers: Sequence[int]) -> Iterator[int]:
        """Loads each of these blocks in turn."""
        if not self._resident:
            yield from loaded(self.layerwise, layers)
            return
        for layer in layers:
            if layer not in self._loaded:
                self.layerwise.load(layer, self.layerwise.read(self.layerwise.arch.block(layer)))
                self._loaded.add(layer)
            yield layer

    def enter(self, ids: torch.Tensor) -> Buffer:
        """The input of the first block."""
        return self._stored(self.layerwise.enter(ids))

    def run(self, layer: int, states: torch.Tensor, without: Sequence[Part]) -> Buffer:
        """Runs a loaded block, without some of its parts, on a chunk's hidden states."""
        with skipped(self.layerwise, layer, without):
            return self._stored(self.layerwise.run(layer, states, self._calls[layer]))

    def loss(self, states: torch.Tensor, ids: torch.Tensor) -> float:
        """The summed loss of a chunk, from the output of the last block."""
        return self.layerwise.loss(states, ids)

    def read(self, states: Buffer) -> torch.Tensor:
        """States where the model computes."""
        return states.read(0, states.rows).to(self.layerwise.device)

    def free(self, states: Buffer) -> None:
        """Forgets states."""
        if states.path is not None:
            states.path.unlink()
        else:
            self._room[states.device] += states.nbytes
        states.close()

    def _stored(self, states: torch.Tensor) -> Buffer:
        """The states, in the first memory that has room for them, else in a file."""
        rows, *shape = states.shape
        for device, room in self._room.items():
            if states.nbytes <= room:
                self._room[device] -= states.nbytes
                made = Buffer(rows, tuple(shape), states.dtype, device=device)
                break
        else:
            self._files += 1
            path = self._folder / f"{self._files}.spool"
            made = Buffer(rows, tuple(shape), states.dtype, path=path)
        made.write(0, states)
        return made
