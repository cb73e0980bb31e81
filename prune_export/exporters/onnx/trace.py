"""Traces a causal language model once for each kind of block, without its weights.

The model is built with parameters that take no memory and with one block of each kind; markers
around each block survive into the graph, where `replicate` cuts. The cache never enters the
trace: attention is one marker that says what the whole graph reads from the past.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch
from torch import nn

from prune_export.arch import Arch
from prune_export.arch.roles import CONTROLS
from prune_export.errors import PlanError
from prune_export.exporters._shared.quiet import quiet
from prune_export.exporters._shared.repeatable import sets_in_order
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters.onnx.fuse import optimize
from prune_export.exporters.onnx.markers import DOMAIN, NAME, OTHER, registered
from prune_export.exporters.onnx.recurrent import recurrences, shifted
from prune_export.exporters.onnx.widths import resize

OPSET: Final = 23


@dataclass(frozen=True)
class Trace:
    """A traced graph with markers, and which block of it stands for which layer.

    `model` is an `onnx_ir.Model` whose weights are inputs, named as in the torch model; `blocks` is
    the path of the block list (`model.layers`); `kinds[i]` is the traced block that stands for
    layer `i`; `buffers` are the values of what is computed rather than stored; `tied` names, for a
    parameter that shares its storage, the others that do; `parameter_of` gives the torch name of a
    tensor in a file; `experts_visited` is the fraction of its experts that a token visits;
    `routers` are parameters of the traced model that choose experts, which rounding would send to
    others, or control a recurrence.
    """

    model: Any
    blocks: str
    kinds: tuple[int, ...]
    buffers: Mapping[str, torch.Tensor]
    tied: Mapping[str, tuple[str, ...]]
    parameter_of: Callable[[str], str]
    experts_visited: float
    routers: frozenset[str]


def trace(
    config: Any, dtype: torch.dtype, blocks: str, *, last: bool, trim: Trim | None = None
) -> Trace:
    """Traces the model of a transformers config; with `last`, only the last position's logits.

    Axes that `trim` shrinks have the sizes of `widths` in the trace.

    Raises:
        PlanError: transformers' code of this model cannot be traced this way.
    """
    model = weightless(config, dtype)
    kinds, firsts = _kinds(model.get_submodule(blocks), model.config)
    if trim:
        resize(model, blocks, trim, _renaming(model))
    _reduce(model, blocks, firsts)
    wrapper = _Wrapper(model, last)
    _mark(model.get_submodule(blocks))
    with registered(), recurrences(model), sets_in_order(model):
        graph = _graph_of(wrapper, config)
    rename = _renaming(model)
    routers = _routers(model)
    if trim is not None:
        routers |= _controls(trim.arch, blocks, firsts, rename)
    names = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    known = {f"model.{name}" for name, _ in names}
    optimize(graph, DOMAIN, known, {f"model.{name}" for name in routers})
    return Trace(
        graph, blocks, kinds, dict(_computed(model)), _tied(model), rename,
        _experts_visited(model), routers,
    )  # fmt: skip


def _renaming(model: Any) -> Callable[[str], str]:
    """Gets transformers' own renaming of stored names, such as `embed_out` to `lm_head`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    return lambda name: str(rename_source_key(name, rules, [])[0])


def _routers(model: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "Router" in type(module).__name__
        for name in module._parameters
    )


def _controls(
    arch: Arch, blocks: str, firsts: list[int], rename: Callable[[str], str]
) -> frozenset[str]:
    """The parameters of the traced blocks that control a recurrence."""
    return frozenset(
        rename(tensor.name).replace(f"{blocks}.{first}.", f"{blocks}.{number}.", 1)
        for number, first in enumerate(firsts)
        for tensor in arch.block(first)
        if tensor.role in CONTROLS
    )


def _experts_visited(model: Any) -> float:
    used = getattr(model.config, "num_experts_per_tok", None)
    counts = [m.num_experts for m in model.modules() if hasattr(m, "is_concatenated")]
    return used / counts[0] if used and counts else 1.0


def _computed(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None:
                yield f"{path}.{name}" if path else name, buffer


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Finds, for each parameter that shares its storage, the names of the others that do."""
    sharing: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in sharing.values()
        for name in names
        if len(names) > 1
    }


def weightless(config: Any, dtype: torch.dtype) -> Any:
    """Builds the model with parameters of stride 0, which take no memory, and real buffers."""
    from torch.nn.modules.conv import _ConvNd
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    original, filled = nn.Module.register_parameter, _ConvNd.reset_parameters

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and any(param.stride()):
            param = nn.Parameter(torch.zeros((), dtype=dtype).expand(param.shape), False)
            param._is_hf_initialized = True  # type: ignore[attr-defined]  # not to be written to
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    setattr(_ConvNd, "reset_parameters", lambda _: None)  # noqa: B010  # it writes in place
    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                dtype=dtype,
                attn_implementation="eager",
                trust_remote_code=False,
            )
        model.tie_weights()
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
        setattr(_ConvNd, "reset_parameters", filled)  # noqa: B010
    return model.eval()


def _kinds(layers: nn.ModuleList, config: Any) -> tuple[tuple[int, ...], list[int]]:
    """Sorts layers by kind: the number of each layer's kind, and the first layer of each kind."""
    found: dict[Any, int] = {}
    firsts: list[int] = []
    kinds = []
    for number, layer in enumerate(layers):
        listed = tuple(
            (key, repr(value[number])) for key, value in _per_layer(config, len(layers)).items()
        )
        sign = (listed, *_signature(layer))
        if sign not in found:
            found[sign] = len(firsts)
            firsts.append(number)
        kinds.append(found[sign])
    return tuple(kinds), firsts


def _per_layer(config: Any, layers: int) -> dict[str, list[Any]]:
    derived = {
        name: getattr(config, name)
        for name in ("layer_types", "layers_block_type")
        if isinstance(getattr(type(config), name, None), property)
    }
    return {
        key: list(value)
        for key, value in {**vars(config), **derived}.items()
        if isinstance(value, list | tuple)
        and len(value) == layers
        and key != "architectures"
        and not any(isinstance(entry, float) for entry in value)  # factors and limits
    }


def _signature(layer: nn.Module) -> Iterator[Any]:
    """Identifies what a block computes: all that matters but its weights and its number."""
    for path, module in layer.named_modules():
        yield path, type(module).__qualname__
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield name, None if tensor is None else (tuple(tensor.shape), tensor.dtype)
        for name, buffer in module._buffers.items():
            if buffer is not None and name in module._non_persistent_buffers_set:
                yield name, sha256(buffer.flatten().view(torch.uint8).numpy()).hexdigest()
        for name, value in sorted(vars(module).items()):
            if name not in ("layer_idx", "layer_id", "training") and _plain(value):
                yield name, repr(value)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(entry) for entry in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _reduce(model: Any, blocks: str, firsts: list[int]) -> None:
    """Removes all blocks but one of each kind, in the model and the config."""
    layers = model.get_submodule(blocks)
    lists = _per_layer(model.config, len(layers))
    parent, _, child = blocks.rpartition(".")
    chosen = nn.ModuleList([layers[first] for first in firsts])
    setattr(model.get_submodule(parent), child, chosen)
    for number, layer in enumerate(chosen):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                vars(module)["layer_idx"] = number
            if hasattr(module, "is_concatenated"):  # stacked experts: one of them is traced
                for name, stack in list(module._parameters.items()):
                    if stack is not None:
                        setattr(module, name, nn.Parameter(stack[0], requires_grad=False))
    configs = {id(module.config): module.config for module in model.modules()
               if hasattr(module, "config")}  # fmt: skip
    for config in configs.values():
        left = {key: [value[i] for i in firsts] for key, value in lists.items()}
        plain = {key: value for key, value in left.items() if key in vars(config)}
        vars(config).update(plain)
        if left.keys() - plain.keys():  # what properties derive, of which keys no longer are true
            kind = type(config)
            config.__class__ = type(kind.__name__, (kind,), {**left})
        config.num_hidden_layers = len(firsts)
        config._attn_implementation = config._experts_implementation = NAME
        config.use_cache = True


def _mark(layers: nn.ModuleList) -> None:
    for number, layer in enumerate(layers):

        def before(module: Any, args: Any, kwargs: Any, number: int = number) -> Any:
            if args:
                return (_marker("BlockInput", args[0], number), *args[1:]), kwargs
            hidden = _marker("BlockInput", kwargs["hidden_states"], number)
            return args, kwargs | {"hidden_states": hidden}

        def after(module: Any, args: Any, result: Any, number: int = number) -> Any:
            if isinstance(result, tuple):
                return (_marker("BlockOutput", result[0], number), *result[1:])
            return _marker("BlockOutput", result, number)

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after)


def _marker(kind: str, hidden: torch.Tensor, number: int) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", [hidden], {"block": number},
        dtype=hidden.dtype, shape=hidden.shape, version=1,
    )  # fmt: skip


class _Past:
    """Stands for the KV cache in the trace: lengths come from the mask, contents from markers."""

    is_compileable = False

    def __init__(self, total: int | torch.SymInt) -> None:
        self.total = total
        self.seen: Any = 0

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        return self.total, 0

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, as before a prompt: what a block computes of several tokens is traced."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None: `_recur` reads the state where it stands."""

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> torch.Tensor:
        return shifted(conv_states, conv_kernel_size, layer_idx)

    def update_recurrent_state(self, state: None, layer_idx: int, state_idx: int = 0) -> None:
        """Does nothing: the marker writes the state."""

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class _Wrapper(nn.Module):
    def __init__(self, model: Any, last: bool) -> None:
        super().__init__()
        self.model = model
        self.last = last

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        past = _Past(attention_mask.shape[1])
        past.seen = attention_mask.shape[1] - input_ids.shape[1]
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past, use_cache=True, logits_to_keep=int(self.last),
        )  # fmt: skip
        logits: torch.Tensor = found.logits
        return logits


def _graph_of(wrapper: _Wrapper, config: Any) -> Any:
    batch, new, past = 2, 3, 5  # any sizes but 0 and 1, which torch would take for constants
    ids = torch.zeros(batch, new, dtype=torch.long)
    mask = torch.ones(batch, past + new, dtype=torch.long)
    positions = torch.arange(past, past + new).repeat(batch, 1)
    dim = torch.export.Dim
    named = (dim("batch"), dim("sequence"), dim("total_sequence"))
    shapes = ({0: named[0], 1: named[1]}, {0: named[0], 1: named[2]}, {0: named[0], 1: named[1]})
    try:
        with torch.no_grad(), quiet():
            program = torch.export.export(
                wrapper, (ids, mask, positions), dynamic_shapes=shapes, strict=False
            )
            exported = torch.onnx.export(
                program, args=(), opset_version=OPSET, optimize=False, verbose=False
            )
            assert exported is not None  # it is, unless a file was given to write to
            return exported.model
    except PlanError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise PlanError(
            f"onnx  {config.model_type}",
            f"torch cannot trace this model: {type(error).__name__}: {reason[0] if reason else ''}",
            OTHER,
        ) from error
