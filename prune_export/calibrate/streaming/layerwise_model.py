"""A transformers model of which one block at a time has weights, for models larger than memory.

The model is built on torch's `meta` device. What stands before the first block (embedding scale,
learned positions, rotary embeddings, masks) and after the last (final norm, head, soft caps) is
transformers' own `forward`, with recorders in the blocks' places: it gives the states that enter
the first block, the arguments that each block is called with, and the logits. So a family needs no
code here, only its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from prune_export.arch import Arch, Tensor
from prune_export.checkpoint import Checkpoint

_EMBEDDING_ROWS: Final = 8192
_LOGITS: Final = 2**24
"""Logits computed at once: 64 MiB in float32."""


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides its hidden states: masks, positions, rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Place(nn.Module):
    """Stands in a block's place: records its arguments, and returns its input, or `carried`.

    With `in_tuple` it returns it in a tuple, as the block does.
    """

    def __init__(self, block: nn.Module, *, in_tuple: bool) -> None:
        super().__init__()
        self._block = [block]  # in a list, so that it is not a submodule
        self._in_tuple = in_tuple
        self.states: torch.Tensor | None = None
        self.carried: torch.Tensor | None = None
        self.call: Call | None = None

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.states, self.call = states, Call(args, kwargs)
        out = states if self.carried is None else self.carried
        return (out, None) if self._in_tuple else out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model may ask a block what kind it is before it calls it.
            return getattr(self.__dict__["_block"][0], name)


class LayerwiseModel:
    """A checkpoint's model on torch's `meta` device; blocks are loaded and freed one at a time.

    It computes in `dtype`.
    """

    def __init__(
        self, checkpoint: Checkpoint, arch: Arch, *, dtype: torch.dtype, device: str
    ) -> None:
        self.checkpoint = checkpoint
        self.arch = arch
        self.dtype = dtype
        self.device = device
        self.model = _on_meta(checkpoint, dtype)
        self._names = ModuleNames(self.model)
        self._embedding = self.model.get_input_embeddings()
        # It matters in training only, and may lie beyond the rows that are looked up.
        self._embedding.padding_idx = None
        self._head = self.model.get_output_embeddings()
        self._blocks = list(self.model.get_submodule(arch.table.blocks))
        self._places = [_Place(block, in_tuple=arch.table.tuple_blocks) for block in self._blocks]
        parent, _, leaf = arch.table.blocks.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, nn.ModuleList(self._places))
        # Without the head; a class of a larger model's text may name no such part.
        base = self.model.base_model
        self._base = self.model.get_submodule(parent) if base is self.model else base
        small = [
            tensor
            for tensor in arch.stored()
            if tensor.layer is None and self._module(tensor) not in (self._embedding, self._head)
        ]
        self._place(self.model, self.read(small))
        _rebuild_buffers(self.model, self.model, device)
        self._known = torch.empty(0, dtype=torch.int64)
        self._rows = torch.empty(0)

    def read(self, tensors: Iterable[Tensor]) -> dict[str, torch.Tensor]:
        """Reads stored tensors by their names in transformers' model; resolves tied ones."""
        return self._names.converted(
            {
                tensor.name: self.checkpoint.read_finite(tensor.tied_to or tensor.name)
                for tensor in tensors
            }
        )

    def converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts stored tensors to transformers' names and layouts, for `load`."""
        return self._names.converted(tensors)

    def look_up(self, ids: torch.Tensor) -> None:
        """Reads the rows of the embedding for these ids, and no others."""
        wanted = torch.unique(ids)
        name = next(
            tensor.name for tensor in self.arch.stored() if self._module(tensor) is self._embedding
        )
        count = self.checkpoint.entries[name].shape[0]
        parts = []
        for start in range(0, count, _EMBEDDING_ROWS):
            stop = min(start + _EMBEDDING_ROWS, count)
            here = wanted[(wanted >= start) & (wanted < stop)]
            if len(here):
                parts.append(self.checkpoint.read_rows(name, start, stop)[here - start])
        self._known, self._rows = wanted, torch.cat(parts)

    def forget_rows(self) -> None:
        """Frees what `look_up` read."""
        self._rows = torch.empty(0)
        self._embedding.weight = nn.Parameter(
            torch.empty_like(self._embedding.weight, device="meta"), requires_grad=False
        )

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeds ids that were looked up: the first block's input `[samples, length, residual]`."""
        own, places = torch.unique(ids, return_inverse=True)
        rows = self._rows[torch.searchsorted(self._known, own)]
        # The model embeds them itself: some families scale in the embedding, others behind it.
        self._embedding.weight = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
        self._base(input_ids=places.to(self.device), use_cache=False)
        states = self._places[0].states
        assert states is not None
        return states

    def calls(self, ids: torch.Tensor) -> list[Call]:
        """The arguments of each block for windows of this length.

        Recorded with a single window: as nothing is padded, masks and positions do not depend on
        the sample, and broadcast.
        """
        self.enter(ids[:1])
        found = [place.call for place in self._places if place.call is not None]
        for place in self._places:
            place.call = place.states = None
        return found

    def load(self, layer: int, tensors: dict[str, torch.Tensor]) -> None:
        """Loads a block from tensors that `read` gave, and empties `tensors`."""
        prefix = f"{self.arch.table.blocks}.{layer}."
        own = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors)}
        self._place(self._blocks[layer], own)
        _rebuild_buffers(self.model, self._blocks[layer], self.device)
        left = [name for name, tensor in self._blocks[layer].named_parameters() if tensor.is_meta]
        if left:
            raise RuntimeError(f"{prefix}{left[0]} is not among the tensors of the table")

    def free(self, layer: int) -> None:
        """Frees a block's tensors."""
        self._blocks[layer].to("meta")

    def module(self, tensor: Tensor) -> nn.Module:
        """The module of a loaded block that holds a tensor, one that is not fused with others."""
        path = self.name_in_block(tensor).rpartition(".")[0]
        assert tensor.layer is not None
        found: nn.Module = self._blocks[tensor.layer].get_submodule(path)
        return found

    def name_in_block(self, tensor: Tensor) -> str:
        """The name, inside its block, of the parameter that a stored tensor is, or is a part of."""
        return self.name_in_memory(tensor).removeprefix(f"{self.arch.table.blocks}.{tensor.layer}.")

    def name_in_memory(self, tensor: Tensor) -> str:
        """The name, in transformers' model, of the parameter that a tensor is, or is a part of."""
        return self._names.renamed(tensor.name)

    def block(self, layer: int) -> nn.Module:
        """The module of a block."""
        found: nn.Module = self._blocks[layer]
        return found

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """The parameters of a loaded block, by their names in it."""
        return dict(self._blocks[layer].named_parameters())

    def run(self, layer: int, states: torch.Tensor, call: Call) -> torch.Tensor:
        """Runs a block on hidden states `[samples, length, residual]`; gives that shape again."""
        kwargs = dict(call.kwargs)
        for name in self.arch.table.per_sample:
            if kwargs.get(name) is not None:  # recorded with one window
                kwargs[name] = kwargs[name].repeat(len(states), *[1] * (kwargs[name].dim() - 1))
        out = self._blocks[layer](states, *call.args, **kwargs)
        result: torch.Tensor = out[0] if isinstance(out, tuple | list) else out
        return result

    def load_head(self) -> None:
        """Loads the final norm and the LM head."""
        head = [tensor for tensor in self.arch.tensors if self._module(tensor) is self._head]
        self._place(self.model, self.read(head))

    def free_head(self) -> None:
        """Frees the final norm and the LM head."""
        self._head.to("meta")

    def loss(
        self, states: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor | None = None
    ) -> float:
        """The summed next-token cross entropy, in nats, from the outputs of the last block.

        The model's own norm, head, scale and soft cap give the logits, some positions at a time.
        Of all windows alike, tokens that `counted` bool `[length]` does not mark are left out.
        """
        total = 0.0
        for window, own in zip(states, ids.to(self.device), strict=True):
            for start, stop in self._parts(len(own)):
                part = window[None, start:stop].to(self.device)
                target = own[start + 1 : stop + 1]
                if counted is not None:
                    # Its `ignore_index`.
                    target = target.masked_fill(
                        ~counted[start + 1 : stop + 1].to(self.device), -100
                    )
                total += float(self._loss_of(part, target))
        return total

    def predictions(self, states: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """The logits float32 `[positions, vocab]` of windows whose last block gave `states`.

        With each the number of its window and of its first position; the last one of a window,
        which predicts nothing that is in it, is left out.
        """
        for number, window in enumerate(states):
            for start, stop in self._parts(len(window)):
                yield number, start, self._logits(window[None, start:stop].to(self.device))

    def loss_gradient(self, states: torch.Tensor, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The sum over windows of the mean loss a token, and its gradient by `states`."""
        total, gradient = 0.0, torch.zeros_like(states, device=self.device)
        for at, (window, own) in enumerate(zip(states, ids.to(self.device), strict=True)):
            for start, stop in self._parts(len(own)):
                part = window[None, start:stop].detach().to(self.device).requires_grad_()
                with torch.enable_grad():
                    loss = self._loss_of(part, own[start + 1 : stop + 1]) / (len(own) - 1)
                gradient[at, start:stop] = torch.autograd.grad(loss, part)[0][0]
                total += float(loss.detach())
        return total, gradient

    def _parts(self, length: int) -> Iterator[tuple[int, int]]:
        """Splits the positions that have a next token into groups whose logits fit in memory."""
        step = max(1, _LOGITS // int(self._head.weight.shape[0]))
        for start in range(0, length - 1, step):
            yield start, min(start + step, length - 1)

    def _loss_of(self, part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self._logits(part), target, reduction="sum")

    def _logits(self, part: torch.Tensor) -> torch.Tensor:
        """`[positions, vocab]` float32, of the last block's states `[1, positions, residual]`."""
        # Never read: only its shape matters, for the positions it is mapped to.
        width = int(self._embedding.weight.shape[-1])
        blank = torch.zeros(1, part.shape[1], width, dtype=self.dtype, device=self.device)
        self._places[0].carried = part
        logits: torch.Tensor = self.model(inputs_embeds=blank, use_cache=False).logits[0].float()
        self._places[0].carried = None
        return logits

    def _module(self, tensor: Tensor) -> nn.Module | None:
        if tensor.layer is not None:
            return None
        path = self._names.renamed(tensor.name).rpartition(".")[0]
        found: nn.Module = self.model.get_submodule(path)
        return found

    def _place(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            path, _, leaf = name.rpartition(".")
            owner, stored = module.get_submodule(path), tensors.pop(name)
            if leaf in owner._buffers:
                # Not a weight, and no gradient reaches it; what is stored precisely stays so.
                setattr(owner, leaf, stored.to(self.device, non_blocking=True))
                continue
            value = stored.to(self.device, self.dtype, non_blocking=True)
            parameter = nn.Parameter(value, requires_grad=False)
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # stays as it is
            setattr(owner, leaf, parameter)


def _on_meta(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    full = checkpoint.full_config()
    config = CONFIG_MAPPING[full["model_type"]].from_dict(full)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def _rebuild_buffers(model: Any, module: nn.Module, device: str) -> None:
    """Computes what no checkpoint stores (rotary frequencies, embedding scales), off `meta`.

    By transformers' own `_init_weights`, which does the same when it loads a checkpoint; of the
    model too, as some fill the buffers of their blocks from there.
    """
    filled = False
    for part in module.modules():
        buffers = part.named_buffers(recurse=False)
        blank = {name: buffer for name, buffer in buffers if buffer.is_meta}
        for name, buffer in blank.items():
            setattr(part, name, torch.empty_like(buffer, device=device))
        if blank:
            model.base_model._init_weights(part)
            filled = True
    if filled:
        model.base_model._init_weights(model.base_model)


class ModuleNames:
    """Maps stored names and layouts to those of transformers' model, by its own conversions.

    Transformers keeps the experts of a block fused, checkpoints keep them apart.
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._known = frozenset(model.state_dict())
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def renamed(self, name: str) -> str:
        """The name in transformers' model; for a tensor fused with others, that of the whole."""
        return self._rule(name)[0]

    def _rule(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        if name in self._known:
            return name, None
        new, pattern = rename_source_key(name, self._renamings, self._converters)
        return str(new), pattern

    def converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Converts tensors to the names and layouts of transformers' model."""
        return dict(self._converted(tensors))

    def _converted(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        from transformers.core_model_loading import dot_natural_key

        merged: dict[str, Any] = {}
        for name in sorted(tensors, key=dot_natural_key):
            new, pattern = self._rule(name)
            if pattern is None:
                yield new, tensors[name]
                continue
            if new not in merged:
                rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
                merged[new] = deepcopy(rule)
            merged[new].add_tensor(new, name, pattern, tensors[name])
        for new, rule in merged.items():
            made = rule.convert(new, model=self._model, config=self._model.config)
            for name, value in made.items():
                yield name, value[0] if isinstance(value, list) else value
