"""The families that a method refuses, each for a reason that the method names: these and no others.

A contract that returned on any refusal would pass for a method that refuses everything.
"""

from __future__ import annotations

from typing import Final

REFUSED: Final[dict[str, frozenset[str]]] = {
    "laco": frozenset({"qwen3_moe"}),  # its blocks differ in shape and cannot be merged
    # Norms that subtract the mean, norms of outputs, and models that are sliced already.
    "slicegpt": frozenset(
        {
            "gemma2", "gemma3_text", "gpt2", "gpt_neox", "olmo2", "opt", "phi", "sliced_llama",
            "sliced_mistral", "sliced_qwen2", "sliced_qwen3",
        }
    ),
    "ziplm": frozenset({"mixtral", "qwen3_moe"}),  # its MLPs differ, or are experts
}  # fmt: skip

WHOLE_HEADS: Final = frozenset({"gpt2", "gpt_neox", "olmo2", "opt"})
"""Families whose config has no head size, or a norm over all heads: nothing cuts their heads."""


def refuses(name: str, model_type: str) -> bool:
    return model_type in REFUSED.get(name, frozenset())
