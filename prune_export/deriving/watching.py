"""Watches the modules of one block of a random model while single channels of them are moved.

Every channel is moved in a sample of its own, so one pass of the model says what each does: which
features of which later layer follow it, at its own position and at others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

LENGTH: Final = 8
_SAME: Final = 1e-5
"""What differs by less, relative to the largest value, is the same."""


class _Stop(Exception):
    pass


@dataclass(frozen=True)
class Seen:
    """What a module was given and gave, of those that were called, in the order of their calls."""

    name: str
    module: nn.Module
    given: torch.Tensor
    gave: torch.Tensor
    in_tuple: bool


@dataclass(frozen=True)
class Moved:
    """What follows when each channel of a module is moved at one position.

    `block` bool `[channels, LENGTH]`: at which positions the block's output differs; `inputs` bool
    `[channels, LENGTH, features]` of each watched module.
    """

    block: torch.Tensor
    inputs: Mapping[str, torch.Tensor]


def first_tensor(value: Any) -> torch.Tensor | None:
    """The tensor that a module was given or gave, or the first one of several."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple | list) and value and isinstance(value[0], torch.Tensor):
        return value[0]
    return None


class Watched:
    """One block of a model."""

    def __init__(self, model: Any, blocks: str, layer: int, vocabulary: int) -> None:
        self.model = model
        self.block: nn.Module = model.get_submodule(f"{blocks}.{layer}")
        generator = torch.Generator().manual_seed(5)
        self._ids = torch.randint(1, vocabulary, (1, LENGTH), generator=generator)
        self.modules = {name: one for name, one in self.block.named_modules() if name}

    def look(self) -> list[Seen]:
        """What each module of the block is given and gives, on one window."""
        found: list[Seen] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
                given = first_tensor(inputs)
                if given is None:
                    given = first_tensor([one for one in named.values()
                                          if isinstance(one, torch.Tensor)])  # fmt: skip
                gave = first_tensor(output)
                if given is not None and gave is not None:
                    # Copies: what is edited in place later would be seen as it is then.
                    found.append(
                        Seen(
                            name,
                            module,
                            given.clone(),
                            gave.clone(),
                            isinstance(output, tuple | list),
                        )
                    )

            return hook

        with ExitStack() as undo, torch.no_grad():
            for name, module in {"": self.block, **self.modules}.items():
                handle = module.register_forward_hook(note(name), with_kwargs=True)
                undo.callback(handle.remove)
            self.model(self._ids, use_cache=False)
        return found

    def move(
        self, name: str, position: int, watched: Collection[str], width: int | None = None
    ) -> Moved:
        """Moves each channel of a module's output at a position, each in a sample of its own."""
        seen: dict[str, torch.Tensor] = {}
        channels = width or 0

        def shifted(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            value = first_tensor(output)
            assert value is not None
            rows = value.reshape(channels + 1, LENGTH, channels).clone()
            step = 4 * float(rows.std()) + 1
            index = torch.arange(channels)
            rows[index + 1, position, index] += step
            moved = rows.reshape(value.shape)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        if not channels:
            one = next(own for own in self.look() if own.name == name)
            channels = one.gave.numel() // LENGTH
        with self._watching(watched, seen) as hooks:
            hooks(self.modules[name].register_forward_hook(shifted))
            self._run(channels + 1)
        changes = {one: _changed(value, channels + 1) for one, value in seen.items()}
        return Moved(changes.pop("").any(-1), changes)

    def without(self, changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
                watched: Collection[str]) -> dict[str, torch.Tensor]:  # fmt: skip
        """The inputs of watched modules, and the block's output as "", with outputs changed."""
        seen: dict[str, torch.Tensor] = {}

        def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                value = first_tensor(output)
                assert value is not None
                made = change(value)
                return (made, *output[1:]) if isinstance(output, tuple) else made

            return hook

        with self._watching(watched, seen) as hooks:
            for name, change in changes.items():
                hooks(self.modules[name].register_forward_hook(changed(change)))
            self._run(1)
        return seen

    @contextmanager
    def _watching(
        self, watched: Collection[str], seen: dict[str, torch.Tensor]
    ) -> Iterator[Callable[[Any], None]]:
        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: Any) -> None:
                given = first_tensor(inputs)
                if given is not None:
                    seen[name] = given.clone()

            return hook

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = first_tensor(output)
            assert states is not None
            seen[""] = states.clone()
            raise _Stop

        with ExitStack() as undo:
            for name in watched:
                handle = self.modules[name].register_forward_pre_hook(note(name))
                undo.callback(handle.remove)
            undo.callback(self.block.register_forward_hook(stop).remove)

            def placed(handle: Any) -> None:
                undo.callback(handle.remove)

            yield placed

    def _run(self, samples: int) -> None:
        with torch.no_grad():
            try:
                self.model(self._ids.repeat(samples, 1), use_cache=False)
            except _Stop:
                return


def _changed(value: torch.Tensor, samples: int) -> torch.Tensor:
    """Where samples differ from the first: bool `[samples - 1, LENGTH, features]`."""
    rows = value.reshape(samples, LENGTH, -1)
    limit = _SAME * float(rows[0].abs().max())
    found: torch.Tensor = (rows[1:] - rows[:1]).abs() > limit
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same values, in whatever shape."""
    return one.numel() == other.numel() and torch.allclose(
        one.reshape(-1), other.reshape(-1), rtol=1e-4, atol=1e-5
    )
