"""The families that a method refuses, each for a reason that the method names: these and no others.

A contract that returned on any refusal would pass for a method that refuses everything.
"""

from __future__ import annotations

from typing import Final

NO_GATE: Final = frozenset({"bloom"})
"""What width methods cut, no config of these can say."""

SUBTRACTING: Final = frozenset(
    {
        "bloom", "cohere", "cohere2", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "jais2",
        "nemotron", "olmo", "opt", "persimmon", "phi", "phimoe", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Their norms subtract the mean, so residual states cannot be rotated."""

NORMED_OUTPUTS: Final = frozenset(
    {
        "exaone4", "flex_olmo", "gemma2", "gemma3_text", "glm4", "hyperclovax", "olmo2", "olmo3",
    }
)  # fmt: skip
"""Something scales what is added to residual states, or no norm stands before it: no rotation."""

SLICED: Final = frozenset({"sliced_llama", "sliced_mistral", "sliced_qwen2", "sliced_qwen3"})

REFUSED: Final[dict[str, frozenset[str]]] = {
    "laco": frozenset({"qwen3_moe"}),  # its blocks differ in shape and cannot be merged
    # olmoe and helium: no smaller hidden size is one that their configs can say.
    "slicegpt": SUBTRACTING | NORMED_OUTPUTS | SLICED | {"helium", "olmoe"},
    # Its MLPs differ, or are experts.
    "ziplm": NO_GATE | {"flex_olmo", "mixtral", "olmoe", "phimoe", "qwen3_moe"},
    **dict.fromkeys(
        ("llm_pruner", "minitron", "structured_gblm", "structured_magnitude", "structured_wanda"),
        NO_GATE,
    ),
}

WHOLE_HEADS: Final = frozenset(
    {
        "bloom", "falcon", "flex_olmo", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "helium",
        "olmo2", "olmo3", "olmoe", "opt", "persimmon", "stablelm",
    }
)  # fmt: skip
"""Families whose config has no head size, or a norm over all heads: nothing cuts their heads."""


def refuses(name: str, model_type: str) -> bool:
    return model_type in REFUSED.get(name, frozenset())
