"""All weights of a model in training, as they are in memory, and back to how they are stored.

Weights are held in float32 whatever they are stored and computed in: a step is far smaller than
what bfloat16 can tell apart. Transformers keeps some weights in other shapes than checkpoints do
(the experts of a block are one tensor); its own conversions lead back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from prune_export.arch import Arch, Tensor
from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.header import TORCH
from prune_export.checkpoint.loading import load_model
from prune_export.errors import StageError
from prune_export.surgery import Overwrite


def trained_tensors(arch: Arch, embeddings: bool) -> tuple[Tensor, ...]:
    """What `full` trains: the blocks and the norms; with `embeddings` all that is stored."""
    return tuple(
        tensor
        for tensor in arch.stored()
        if not tensor.is_buffer
        and (embeddings or tensor.layer is not None or tensor.role.startswith("norm"))
    )


@dataclass(frozen=True)
class Whole:
    """A model whose own weights are trained.

    `stored` has, by the name of a trained parameter, the stored weights that it is made of, and
    `masks` are False where parameters stay zero.
    """

    model: torch.nn.Module
    stored: Mapping[str, tuple[str, ...]]
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in the order of the model."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def blocks(self, arch: Arch) -> list[torch.nn.Module]:
        """The model's blocks."""
        blocks: Any = self.model.get_submodule(arch.table.blocks)
        return list(blocks)

    def edits(self, source: Checkpoint, keep_zeros: Collection[str]) -> Iterator[Overwrite]:
        """The edits that put what was trained into `source`; `keep_zeros` keep theirs."""
        parameters = self.trained()
        back = _Back(self.model, source)
        owners = {name: owner for owner, names in self.stored.items() for name in names}
        for name in source.entries:
            if name in owners:
                value = partial(
                    _stored, source, name, back, owners[name], parameters, name in keep_zeros
                )
                yield Overwrite(name, value)


def whole_model(
    source: Checkpoint,
    names: Sequence[str],
    *,
    device: str,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    keep_zeros: Collection[str],
) -> Whole:
    """The model of `source` with its stored weights `names` to train, computing in `dtype`.

    Raises:
        StageError: a parameter of transformers' model is not made of stored weights.
    """
    where = {"": 0 if device == "cuda" else "cpu"}
    model = load_model(source.path, dtype=torch.float32, device_map=where)
    model.requires_grad_(False).eval()
    asked, back = set(names), _Back(model, source)
    stored: dict[str, tuple[str, ...]] = {}
    masks: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        own = back.names(name, parameter)
        if asked.isdisjoint(own):
            continue
        stored[name] = own
        parameter.requires_grad_()
        if not set(keep_zeros).isdisjoint(own):
            masks[name] = parameter.detach() != 0
    missed = asked - {one for own in stored.values() for one in own}
    if missed:
        raise StageError(
            sorted(missed)[0],
            f"is no parameter of transformers' model ({len(missed)} of {len(asked)} are not)",
            "report this with the model's config.json",
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if dtype != torch.float32:
        model.forward = partial(_autocast, device, dtype, model.forward)
    return Whole(model, stored, masks)


def _autocast(device: str, dtype: torch.dtype, forward: Any, *args: Any, **named: Any) -> Any:
    with torch.autocast(device, dtype):
        return forward(*args, **named)


class _Back:
    """From parameters to stored weights; the last is kept, as its parts are asked for in turn.

    In files of a larger model (of images and text) they have other names than in `source`.
    """

    def __init__(self, model: Any, source: Checkpoint) -> None:
        self._model = model
        wrapped = source.wrapped
        self._own = {wrapped.stored_name(name): name for name in source.entries} if wrapped else {}
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def names(self, name: str, parameter: torch.Tensor) -> tuple[str, ...]:
        """The stored weights that a parameter is made of."""
        return tuple(self._reverted(name, torch.empty_like(parameter, device="meta")))

    def part(self, name: str, parameter: torch.Tensor, stored: str) -> torch.Tensor:
        """One of them."""
        if self._last[0] != name:
            self._last = name, self._reverted(name, parameter.detach())
        return self._last[1][stored]

    def _reverted(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, torch.Tensor] = revert_weight_conversion(self._model, {name: value})
        return {self._own.get(stored, stored): part for stored, part in found.items()}


def _stored(
    source: Checkpoint,
    name: str,
    back: _Back,
    owner: str,
    parameters: Mapping[str, torch.nn.Parameter],
    keeps_zeros: bool,
) -> torch.Tensor:
    dtype = getattr(torch, TORCH[source.entries[name].dtype])
    made = back.part(owner, parameters[owner], name).to("cpu", dtype).contiguous()
    if not keeps_zeros:
        return made
    before = source.read(name)
    return torch.where(before == 0, before, made)
