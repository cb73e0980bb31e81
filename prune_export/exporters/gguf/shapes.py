"""What llama.cpp must be told of a model: its architecture there, sizes by layer, rotary angles.

A model whose blocks are alike is written as `llama`, `qwen2` or `qwen3`. One with zeroed heads or
channels in single blocks becomes `deci`, whose sizes may differ by layer, without the zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from prune_export.errors import PlanError
from prune_export.exporters._shared.trim import Trim

ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
"""Model types, and the architecture of llama.cpp that computes the same."""

NAMES: Final[Mapping[str, str]] = {
    "embed": "token_embd", "norm.final": "output_norm", "head": "output",
    "norm.attn": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "norm.q": "attn_q_norm", "norm.k": "attn_k_norm", "norm.mlp": "ffn_norm",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
"""The name in a GGUF file of the tensor that plays a role."""

_NARROW: Final = "deci"
_ROPES: Final = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Shapes:
    """The model as llama.cpp sees it; the tuples have a number for each layer."""

    architecture: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]
    head_size: int

    @property
    def interleaved(self) -> bool:
        """Whether llama.cpp turns neighbours in pairs, so that rows of q and k must be moved."""
        return self.architecture in ("llama", _NARROW)

    def rows_of(self, role: str, layer: int, values: np.ndarray) -> np.ndarray:
        """The rows of q or k in the order that llama.cpp turns them in: halves become pairs."""
        kind = role.removesuffix(".bias")
        if not self.interleaved or kind not in ("q", "k"):
            return values
        heads = (self.heads if kind == "q" else self.kv_heads)[layer]
        halves = values.reshape(heads, 2, self.head_size // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def shapes_of(trim: Trim, config: Mapping[str, Any]) -> Shapes:
    """Sizes after what is zero was left out.

    Raises:
        PlanError: llama.cpp has no architecture that computes this model.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise PlanError(
            f"gguf  model_type {model_type}",
            "is not written as GGUF",
            f"these are: {', '.join(ARCHITECTURES)}; llama.cpp's own converter knows more",
        )
    _refuse_other_computations(config)
    layers = range(trim.arch.layers)
    kv = tuple(trim.size(f"kv.{layer}") for layer in layers)
    heads = tuple(count * trim.size(f"group.{layer}") for layer, count in enumerate(kv))
    channels = tuple(trim.size(f"mlp.{layer}") for layer in layers)
    alike = all(len(set(sizes)) == 1 for sizes in (heads, kv, channels))
    architecture = ARCHITECTURES[model_type]
    if not alike and architecture != "llama":
        raise PlanError(
            f"gguf  model_type {model_type}",
            "has blocks of different widths, which llama.cpp computes for llama alone",
            "pass `--keep-zeros`: the file is then as large as the checkpoint",
        )
    return Shapes(
        architecture if alike else _NARROW, heads, kv, channels, int(trim.arch.sizes["dim"])
    )


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters, with `rope_theta` and `rope_type`."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    found.setdefault("rope_type", found.pop("type", "default"))
    return found


def rope_factors(rope: Mapping[str, Any], head_size: int) -> np.ndarray | None:
    """By what llama3's scaling divides each frequency, float32 `[head_size / 2]`; None: by 1.

    Source: Llama 3.1's released code, `apply_scaling`: wavelengths beyond
    `original_max_position_embeddings / low_freq_factor` are stretched by `factor`, those below
    `… / high_freq_factor` are kept, and between them it goes over linearly.
    """
    if rope["rope_type"] != "llama3":
        return None
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, head_size, 2) / head_size)
    lengths = 2 * math.pi / frequencies
    share = np.clip((context / lengths - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / factor + share)).astype(np.float32)


def _refuse_other_computations(config: Mapping[str, Any]) -> None:
    wrong: list[tuple[str, Any, str]] = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        wrong.append(("hidden_act", config["hidden_act"], "silu"))
    kind = rope_of(config)["rope_type"]
    if kind not in _ROPES:
        wrong.append(("rope_type", kind, " or ".join(_ROPES)))
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if window and used:
        wrong.append(("sliding_window", window, "none"))
    for key, got, expected in wrong:
        raise PlanError(
            f"gguf  {key}",
            f"got {got!r}, expected {expected}",
            "use llama.cpp's own converter, which may know it",
        )
