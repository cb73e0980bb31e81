"""Models whose residual states have another basis at each norm: SliceGPT's shortcut matrices.

Each block is transformers' own, but where a block's input is added to what attention or MLP made of
it, the input first passes through a matrix that turns it into the basis of what comes next.

This file and `configuration_sliced.py` lie beside every checkpoint that needs them, for those who
load it with `trust_remote_code=True`; with prune_export imported, that is not needed. They import
only torch and transformers.
"""

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
)
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
)
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from .configuration_sliced import (
    SlicedLlamaConfig,
    SlicedMistralConfig,
    SlicedQwen2Config,
    SlicedQwen3Config,
)


class _Shortcuts:
    """A block in which the states change their basis twice; stands before the stock block."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        width = config.hidden_size
        self.attn_shortcut = nn.Linear(width, width, bias=False)
        self.mlp_shortcut = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, **kwargs):
        """What the block makes of `hidden_states`, in the basis of the next block."""
        seen = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=seen, **kwargs)
        hidden_states = self.attn_shortcut(hidden_states) + attended
        seen = self.post_attention_layernorm(hidden_states)
        return self.mlp_shortcut(hidden_states) + self.mlp(seen)


class SlicedLlamaDecoderLayer(_Shortcuts, LlamaDecoderLayer):
    """A llama's block with shortcut matrices."""


class SlicedMistralDecoderLayer(_Shortcuts, MistralDecoderLayer):
    """A mistral's block with shortcut matrices."""


class SlicedQwen2DecoderLayer(_Shortcuts, Qwen2DecoderLayer):
    """A qwen2's block with shortcut matrices."""


class SlicedQwen3DecoderLayer(_Shortcuts, Qwen3DecoderLayer):
    """A qwen3's block with shortcut matrices."""


class _Sliced:
    """A stock model with such blocks in the place of its own."""

    def __init__(self, config):
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([self.block(config, layer) for layer in layers])
        self.post_init()


class SlicedLlamaModel(_Sliced, LlamaModel):
    """A llama without a head."""

    config_class = SlicedLlamaConfig
    block = SlicedLlamaDecoderLayer
    _no_split_modules = ["SlicedLlamaDecoderLayer"]


class SlicedMistralModel(_Sliced, MistralModel):
    """A mistral without a head."""

    config_class = SlicedMistralConfig
    block = SlicedMistralDecoderLayer
    _no_split_modules = ["SlicedMistralDecoderLayer"]


class SlicedQwen2Model(_Sliced, Qwen2Model):
    """A qwen2 without a head."""

    config_class = SlicedQwen2Config
    block = SlicedQwen2DecoderLayer
    _no_split_modules = ["SlicedQwen2DecoderLayer"]


class SlicedQwen3Model(_Sliced, Qwen3Model):
    """A qwen3 without a head."""

    config_class = SlicedQwen3Config
    block = SlicedQwen3DecoderLayer
    _no_split_modules = ["SlicedQwen3DecoderLayer"]


class _WithHead:
    """A stock model with a head on such a model."""

    def __init__(self, config):
        super().__init__(config)
        self.model = self.inner(config)
        self.post_init()


class SlicedLlamaForCausalLM(_WithHead, LlamaForCausalLM):
    """A llama with shortcut matrices."""

    config_class = SlicedLlamaConfig
    inner = SlicedLlamaModel
    _no_split_modules = ["SlicedLlamaDecoderLayer"]


class SlicedMistralForCausalLM(_WithHead, MistralForCausalLM):
    """A mistral with shortcut matrices."""

    config_class = SlicedMistralConfig
    inner = SlicedMistralModel
    _no_split_modules = ["SlicedMistralDecoderLayer"]


class SlicedQwen2ForCausalLM(_WithHead, Qwen2ForCausalLM):
    """A qwen2 with shortcut matrices."""

    config_class = SlicedQwen2Config
    inner = SlicedQwen2Model
    _no_split_modules = ["SlicedQwen2DecoderLayer"]


class SlicedQwen3ForCausalLM(_WithHead, Qwen3ForCausalLM):
    """A qwen3 with shortcut matrices."""

    config_class = SlicedQwen3Config
    inner = SlicedQwen3Model
    _no_split_modules = ["SlicedQwen3DecoderLayer"]
