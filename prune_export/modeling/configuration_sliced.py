"""Configurations of models whose residual states have another basis at each norm."""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


class SlicedLlamaConfig(LlamaConfig):
    """A llama with shortcut matrices."""

    model_type = "sliced_llama"


class SlicedMistralConfig(MistralConfig):
    """A mistral with shortcut matrices."""

    model_type = "sliced_mistral"


class SlicedQwen2Config(Qwen2Config):
    """A qwen2 with shortcut matrices."""

    model_type = "sliced_qwen2"


class SlicedQwen3Config(Qwen3Config):
    """A qwen3 with shortcut matrices."""

    model_type = "sliced_qwen3"
