"""The families that a method refuses, each for a reason that the method names: these and no others.

A contract that returned on any refusal would pass for a method that refuses everything.
"""

from __future__ import annotations

from typing import Final

from tests.arch.kinds import HALF_BLOCKS

_ALIBI: Final = frozenset({"bloom"})
"""Heads have slopes by their number, and the MLP is always four times as wide as the states."""

_FUSED: Final = frozenset({"gpt_oss", "granitemoe", "granitemoeshared"})
"""The experts of a block are one tensor on disk, of which nothing is cut and made sparse."""

_PARTLY_FUSED: Final = _FUSED | {"llama4_text", "mistral4"}
"""These too, in some blocks only: of others the MLP can be cut."""

REFUSED: Final[dict[str, frozenset[str]]] = {
    "every_other": frozenset({"gemma4_text"}),  # its last block must stay
    "gblm": _PARTLY_FUSED,
    "gptq": _PARTLY_FUSED,
    "iterative_magnitude": _PARTLY_FUSED,
    "magnitude": _PARTLY_FUSED,
    "ria": _PARTLY_FUSED,
    "rtn": _PARTLY_FUSED,
    "sparsegpt": _PARTLY_FUSED,
    "wanda": _PARTLY_FUSED,
    # Their blocks differ in shape and cannot be merged.
    "laco": frozenset(
        {
            "bamba", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "gemma4_text",
            "glm4_moe", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "llama4_text", "mistral4",
            "nemotron_h", "qwen2_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
            "qwen3_next",
        }
    ),
    "llm_pruner": _ALIBI | _FUSED | {"mistral4"},
    "minitron": _ALIBI | _FUSED | {"mistral4"},
    "structured_gblm": _ALIBI | _FUSED | {"mistral4"},
    "structured_magnitude": _ALIBI | _FUSED | {"mistral4"},
    "structured_wanda": _ALIBI | _FUSED | {"mistral4"},
    # Norms that subtract the mean, norms of outputs, models that are sliced already, and configs
    # that cannot say another hidden size.
    "slicegpt": frozenset(
        {
            "bamba", "bloom", "cohere", "cohere2", "exaone4", "falcon", "flex_olmo", "gemma2",
            "gemma3_text", "gemma4_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
            "granitemoehybrid", "helium", "hyperclovax", "jais2", "jamba", "lfm2", "lfm2_moe",
            "minicpm3", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3", "olmoe", "opt",
            "persimmon", "phi", "phimoe", "sliced_llama", "sliced_mistral", "sliced_qwen2",
            "sliced_qwen3", "stablelm", "starcoder2",
        }
    ),
    # Their MLPs differ, or are experts, or are as wide as the states ask, or some blocks have no
    # attention.
    "ziplm": frozenset(
        {
            "bamba", "bloom", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo",
            "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared",
            "hunyuan_v1_moe", "jamba", "lfm2", "lfm2_moe", "llama4_text", "minimax_m2", "mistral4",
            "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text",
            "qwen3_5_text", "qwen3_moe", "qwen3_next",
        }
    ),
}  # fmt: skip

WHOLE_HEADS: Final = frozenset(
    {
        "bloom", "falcon", "flex_olmo", "gemma4_text", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
        "helium", "minimax_m2", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
        "stablelm",
    }
)  # fmt: skip
"""Families whose config has no head size, or a norm over all heads: nothing cuts their heads."""


def refused_by(name: str, unit: str | None) -> frozenset[str]:
    """The families that a method refuses, with this `unit` where it has one."""
    halves = HALF_BLOCKS if unit in ("attention", "mlp") else frozenset()
    return REFUSED.get(name, frozenset()) | halves


def refuses(name: str, model_type: str, unit: str | None = None) -> bool:
    return model_type in refused_by(name, unit)
