from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prune_export.machine import Machine


def save_tiny(out: Path, *, seed: int = 0, layers: int = 3, vocab: int = 256) -> Path:
    """A random llama with decisive logits, and a tokenizer whose 256 tokens are the bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: at for at, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = {"bos_token": characters[0], "eos_token": characters[0]}  # id 0
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("other"), seed=1, layers=2)


@pytest.fixture(scope="session")
def machine() -> Machine:
    return Machine(device="cpu", ram_bytes=4 << 30, gpu_bytes=0, threads=1)


@pytest.fixture(scope="session")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 48))
