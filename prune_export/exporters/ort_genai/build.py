"""Runs onnxruntime-genai's model builder as a program, because it prints and never frees memory.

    python -m prune_export.exporters.ort_genai.build REQUEST.json

The request holds `source`, `out`, `cache`, `precision`, `options` and `corrections`; for an integer
precision also its `bits` (else 0), those of the head, and the block size. A checkpoint that is wide
with zeros becomes a narrow graph; the codes of a quantized one are written as they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prune_export.checkpoint import Checkpoint
from prune_export.checkpoint.grid_file import Grids
from prune_export.checkpoint.loading import NO_ADAPTER
from prune_export.exporters._shared.trim import Trim
from prune_export.exporters.ort_genai.codes import (
    give_codes,
    give_nearest,
    join_codes,
    joinable,
    refuse_lost,
)
from prune_export.exporters.ort_genai.trim import cut, leaves_out, narrow


def main(request: dict[str, Any]) -> None:
    """Builds the graph that the request describes into its `out`."""
    from onnxruntime_genai.models import builder

    source, out, cache = request["source"], request["out"], request["cache"]
    where = ("", source, out, request["precision"], "cpu", cache)
    options = [f"{key}={value}" for key, value in request["options"].items()]
    prepared = builder.parse_extra_options(*where, options)
    config = prepared["hf_details"]["hf_config"]
    for key, value in request["corrections"].items():
        setattr(config, key, value)
    checkpoint = Checkpoint.open(source)
    grids = Grids.of(checkpoint) if request["precision"].startswith("int") else None
    trim = Trim.of(checkpoint)
    if grids:
        trim = trim.whole_parts()  # a group whose channels are cut has no grid any more
    if trim and request["precision"] == "fp16":
        trim = trim.with_all_heads()  # its attention's mask has a row for each head of the model
    bits, block = (int(request[key]) for key in ("bits", "block_size"))

    def give(model: Any) -> None:
        if grids:
            give_codes(model, checkpoint, grids, (bits, block))
        if grids or request["head_bits"] != bits:
            give_nearest(model.get_output_embeddings(), request["head_bits"], block)

    caches = _prepare(builder, trim, give if bits else None)
    builder.create_model(*where, **prepared)
    if grids:
        refuse_lost(Path(out) / "model.onnx", checkpoint, grids)
    if caches:
        _tell_caches(Path(out) / "genai_config.json", *caches)
    if caches or request["precision"] == "fp16":
        _forget_shapes(Path(out) / "model.onnx")


def _prepare(builder: Any, trim: Trim, give: Callable[[Any], None] | None) -> list[int]:
    """Makes the builder read weights in float32, and trims them; gives the number of KV caches.

    `give` puts codes beside the weights.
    """
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    start = builder.Model.make_inputs_and_outputs
    chosen: list[Trim] = []
    caches: list[int] = []

    def loaded(*given: Any, **named: Any) -> Any:
        # The builder folds constants into weights in the checkpoint's dtype; in bfloat16 Gemma's
        # `1 + weight` loses most of its digits.
        # It says nothing of adapters, and would trust code where an option said so.
        named |= {"trust_remote_code": False, "adapter_kwargs": dict(NO_ADAPTER)}
        model = load(*given, dtype="float32", **named)
        for one in chosen:
            cut(model, one)
        if give:
            give(model)
        return model

    def started(made: Any) -> None:
        # A runtime without any cache would not know how long the past is.
        some = any(t.role == "o" and t.name not in trim.dead for t in trim.arch.stored())
        chosen.append(trim if some and leaves_out(made, builder.Model) else trim.all_alive())
        caches.append(narrow(made, chosen[0]))
        start(made)

    AutoModelForCausalLM.from_pretrained = loaded
    if give:
        _pack_codes(builder.Model)
    if trim:
        builder.Model.make_inputs_and_outputs = started
    return caches


def _pack_codes(model: Any) -> None:
    """Makes the builder join codes of symmetric grids, which have no zeros, as well."""
    join, packable = model.make_packed_matmul_int4_class, model.is_qkv_projection_packable

    def joined(made: Any, q: Any, k: Any, v: Any) -> Any:
        return join_codes(q, k, v) if hasattr(q, "qweight") else join(made, q, k, v)

    def asked(made: Any, layer: int, attention: Any) -> bool:
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        alike = not hasattr(parts[0], "qweight") or joinable(*parts)
        return alike and bool(packable(made, layer, attention))

    model.make_packed_matmul_int4_class = joined
    model.is_qkv_projection_packable = asked


def _tell_caches(config: Path, count: int) -> None:
    """Sets the config's number of layers to that of KV caches, which the runtime asks for."""
    said = json.loads(config.read_text(encoding="utf-8"))
    said["model"]["decoder"]["num_hidden_layers"] = count
    config.write_text(json.dumps(said, indent=4), encoding="utf-8")


def _forget_shapes(graph: Path) -> None:
    """Removes the shapes of inner values, with which ONNX Runtime would refuse the graph.

    The builder's are wrong in fp16, and it gives widths that differ by block the same name.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    del model.graph.value_info[:]
    onnx.save(model, str(graph))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
