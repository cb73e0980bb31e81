"""The model that is loaded block by block."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prune_export.calibrate.streaming.layerwise_model import LayerwiseModel
from prune_export.checkpoint import Checkpoint


def test_a_padding_token_beyond_the_rows_that_are_looked_up_does_no_harm(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, pad_token_id=63, **sizes)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    own = LayerwiseModel(checkpoint, checkpoint.arch(), dtype=torch.float32, device="cpu")
    ids = torch.tensor([[5, 9, 5]])
    with torch.inference_mode():
        own.look_up(ids.flatten())
        entered = own.enter(ids)
    assert torch.equal(entered, model.model.embed_tokens(ids))
