"""The `config.pbtxt` of each kind of model, in the text form of Triton's `ModelConfig`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prune_export.errors import CheckpointError, MissingExtra

Value = str | int | bool | Mapping[str, Any] | Sequence[Any]


class Enum(str):
    """A name of an enumeration, which is written without quotes."""


_TYPES: Final = {1: "FP32", 10: "FP16", 16: "BF16", 7: "INT64", 6: "INT32"}
"""Triton's name of each of ONNX's numbers of a type."""


@dataclass(frozen=True)
class Cache:
    """One tensor of the KV cache: of key-value heads and their size."""

    layer: int
    part: str
    heads: int
    head_size: int
    kind: str


@dataclass(frozen=True)
class Graph:
    """What a graph takes and gives besides its cache; `vocabulary` is the width of its logits."""

    positions: bool
    vocabulary: int
    logits_kind: str
    caches: tuple[Cache, ...]


def genai(name: str) -> str:
    """The Python backend with onnxruntime-genai inside: decoupled, so that it can stream."""
    options = [
        ("max_tokens", "INT32", 1), ("temperature", "FP32", 1), ("top_p", "FP32", 1),
        ("seed", "INT64", 1), ("stop", "STRING", -1), ("stream", "BOOL", 1),
    ]  # fmt: skip
    return text_of({
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [
            _tensor("text_input", "STRING", [1]),
            *(_tensor(key, kind, [size]) | {"optional": True} for key, kind, size in options),
        ],
        "output": [
            _tensor("text_output", "STRING", [1]), _tensor("finish_reason", "STRING", [1]),
            _tensor("completion_tokens", "INT32", [1]),
        ],
        "instance_group": [{"count": 1, "kind": Enum("KIND_CPU")}],
    })  # fmt: skip


def with_state(name: str, graph: Graph, backend: str, *, idle_seconds: int = 600) -> str:
    """A graph whose KV cache Triton keeps from one request of a sequence to the next.

    A request brings the new tokens alone, a mask over all so far, and their positions; the first
    one begins with a cache of no tokens. `backend` is `onnxruntime` or `tensorrt`.
    """
    states = [
        {
            "input_name": f"past_key_values.{one.layer}.{one.part}",
            "output_name": f"present.{one.layer}.{one.part}",
            "data_type": Enum(f"TYPE_{one.kind}"),
            "dims": [one.heads, -1, one.head_size],
            "initial_state": [{
                "name": f"empty_{one.layer}_{one.part}", "data_type": Enum(f"TYPE_{one.kind}"),
                "dims": [one.heads, 0, one.head_size], "zero_data": True,
            }],
        }
        for one in graph.caches
    ]  # fmt: skip
    ids = ["input_ids", "attention_mask", *(["position_ids"] if graph.positions else [])]
    found: dict[str, Any] = {
        "name": name,
        **({"platform": "tensorrt_plan"} if backend == "tensorrt" else {"backend": backend}),
        "max_batch_size": 1,
        "input": [_tensor(key, "INT64", [-1]) for key in ids],
        "output": [_tensor("logits", graph.logits_kind, [-1, graph.vocabulary])],
        "sequence_batching": {
            "max_sequence_idle_microseconds": idle_seconds * 1_000_000, "direct": {},
            "state": states,
        },
    }  # fmt: skip
    if backend == "tensorrt":  # one profile for prompts, one for decoding
        found["default_model_filename"] = "model.plan"
        found["instance_group"] = [
            {"count": 1, "kind": Enum("KIND_GPU"), "profile": ["0", "1"]}
        ]  # fmt: skip
    return text_of(found)


def graph_of(file: Path) -> Graph:
    """Reads what an ONNX graph takes and gives; its weights are not read.

    Raises:
        MissingExtra: onnx is not installed.
        CheckpointError: it is not one of `onnx`: it names no KV cache of known sizes.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra.of("triton", "onnx", "onnx") from error
    model = onnx.load(str(file), load_external_data=False)
    inputs = {one.name: one.type.tensor_type for one in model.graph.input}
    logits = next((one for one in model.graph.output if one.name == "logits"), None)
    caches = []
    for name, kind in inputs.items():
        if name.startswith("past_key_values."):
            _, layer, part = name.split(".")
            sizes = [one.dim_value for one in kind.shape.dim]
            caches.append(Cache(int(layer), part, sizes[1], sizes[3], _TYPES[kind.elem_type]))
    if logits is None or not caches or any(not one.heads * one.head_size for one in caches):
        raise CheckpointError(
            str(file), "is no graph with a KV cache of known sizes",
            "give the engine that `export: onnx` made",
        )  # fmt: skip
    kind = logits.type.tensor_type
    return Graph(
        "position_ids" in inputs, kind.shape.dim[2].dim_value, _TYPES[kind.elem_type], tuple(caches)
    )


def graph_of_config(config: Any, record: Mapping[str, Any]) -> Graph:
    """What a TensorRT engine takes and gives, by the model's config and its build's precision."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    shared = getattr(text, "num_key_value_heads", None) or heads
    kind = {"fp32": "FP32", "bf16": "BF16"}.get(str(record.get("precision")), "FP16")
    caches = tuple(
        Cache(layer, part, shared, head_size, kind)
        for layer in range(text.num_hidden_layers)
        for part in ("key", "value")
    )
    return Graph(True, text.vocab_size, kind, caches)


def text_of(message: Mapping[str, Value]) -> str:
    """A protocol buffer's text form of nested values."""
    return "".join(_lines(message, ""))


def _tensor(name: str, kind: str, dims: list[int]) -> dict[str, Any]:
    return {"name": name, "data_type": Enum(f"TYPE_{kind}"), "dims": dims}


def _lines(message: Mapping[str, Any], indent: str) -> Iterable[str]:
    for key, value in message.items():
        if isinstance(value, Mapping):
            yield f"{indent}{key} {{\n"
            yield from _lines(value, f"{indent}  ")
            yield f"{indent}}}\n"
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for one in value:
                yield from _lines({key: one}, indent)
        elif isinstance(value, list):
            yield f"{indent}{key}: [{', '.join(map(_scalar, value))}]\n"
        else:
            yield f"{indent}{key}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, Enum | int) else json.dumps(value)
