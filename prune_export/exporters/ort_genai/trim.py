"""Makes onnxruntime-genai's builder leave zeroed channels, heads and sub-blocks out.

The builder gives every block the model's sizes. Here a model's own weights are cut before it reads
them, and its sizes are set anew for each attention and MLP. Sub-blocks that only add zero are left
out where the builder chains blocks in its usual way; where a family has a way of its own, a head
and a few channels of theirs stay. Caches are numbered without gaps, as the runtime counts them.

Differs: these are the builder's private parts, of version 0.18 (`OrtGenai.check` insists on it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from prune_export.exporters._shared.trim import Trim


def cut(model: Any, trim: Trim) -> None:
    """Cuts the weights of a transformers model in place."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    for tensor in trim.arch.stored():
        if tensor.layer is not None:
            path, _, name = str(rename_source_key(tensor.name, rules, [])[0]).rpartition(".")
            module = model.get_submodule(path)
            left = trim.cut(tensor.name, getattr(module, name).detach())
            setattr(module, name, nn.Parameter(left, requires_grad=False))
            if isinstance(module, nn.Linear):  # the builder reads widths here, too
                module.out_features, module.in_features = module.weight.shape


def narrow(builder: Any, trim: Trim) -> int:
    """Sets a builder (an instance of its `Model`) to the trimmed sizes, before it makes anything.

    Returns how many blocks have a cache.
    """
    without_attention = {layer for layer in range(trim.arch.layers) if _dead(trim, layer, "o")}
    without_mlp = {layer for layer in range(trim.arch.layers) if _dead(trim, layer, "down")}
    caches = [layer for layer in range(trim.arch.layers) if layer not in without_attention]
    for names, part in (
        (builder.input_names, "past_key_values"),
        (builder.output_names, "present"),
    ):
        for kind in ("key", "value"):
            names[f"{part}.{kind}"] = {
                layer: f"{part}.{number}.{kind}" for number, layer in enumerate(caches)
            }
    _patch(builder, "make_key_value_cache_shape", lambda make, layer, shape: make(
        layer, [shape[0], trim.size(f"kv.{layer}"), *shape[2:]]
    ))  # fmt: skip
    skipped = _Skipped(builder)
    _patch(builder, "make_layernorm", skipped.layernorm)

    def attention(make: Callable[..., None], layer: int, *given: Any, **named: Any) -> None:
        if layer in without_attention:
            skipped.skip()
            return
        kv = trim.size(f"kv.{layer}")
        group = f"group.{layer}"
        heads = kv * (trim.size(group) if group in trim.arch.sizes else 1)
        dim = builder.head_size
        sizes = {"num_kv_heads": kv, "num_attn_heads": heads,
                 "kv_size": kv * dim, "q_size": heads * dim}  # fmt: skip
        _with(builder, sizes, lambda: make(layer, *given, **named))

    def mlp(make: Callable[..., None], layer: int, *given: Any, **named: Any) -> None:
        if layer in without_mlp:
            skipped.skip()
            return
        sizes = {"intermediate_size": trim.size(f"mlp.{layer}")}
        _with(builder, sizes, lambda: make(layer, *given, **named))

    _patch(builder, "make_attention", attention)
    _patch(builder, "make_mlp", mlp)
    return len(caches)


def leaves_out(builder: Any, usual: type[Any]) -> bool:
    """Whether a builder makes blocks as the `usual` one does, which can leave sub-blocks out."""
    kind = type(builder)
    same: bool = kind.make_layer is usual.make_layer
    return same and kind.make_layernorm is usual.make_layernorm


class _Skipped:
    """Stands for a sub-block that was left out: the next norm adds nothing to the residual."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.nothing = False

    def skip(self) -> None:
        self.nothing = True

    def layernorm(
        self, make: Callable[..., None], layer: int, norm: Any, *, skip: bool, **named: Any
    ) -> None:
        make(layer, norm, skip=skip and not self.nothing, **named)
        self.nothing = False


def _dead(trim: Trim, layer: int, role: str) -> bool:
    return any(
        tensor.role == role and tensor.name in trim.dead for tensor in trim.arch.block(layer)
    )


def _patch(builder: Any, name: str, around: Callable[..., Any]) -> None:
    make = getattr(builder, name)
    setattr(builder, name, lambda *given, **named: around(make, *given, **named))


def _with(builder: Any, sizes: dict[str, int], make: Callable[[], None]) -> None:
    before = {name: getattr(builder, name, None) for name in sizes}
    vars(builder).update(sizes)
    try:
        make()
    finally:
        vars(builder).update(before)
