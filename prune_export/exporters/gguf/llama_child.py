"""The process that runs llama.cpp: a JSON request on standard input, one JSON line back."""

from __future__ import annotations

import json
import sys
from typing import Any


def generated(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Greedy tokens with their log probabilities, in float32 beside the file's own weights."""
    import xllamacpp as x

    given = x.CommonParams()
    given.model.path = asked["file"]
    given.n_ctx = max(64, len(asked["ids"]) + asked["new"] + 1)
    given.n_gpu_layers, given.n_parallel, given.warmup = 0, 1, False
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = asked["threads"]
    given.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.cache_type_k = given.cache_type_v = x.ggml_type.GGML_TYPE_F32
    said = x.Server(given).handle_completions(
        {"prompt": asked["ids"], "n_predict": asked["new"], "temperature": 0, "n_probs": 1,
         "cache_prompt": False, "logit_bias": [[one, False] for one in asked["without"]]}
    )  # fmt: skip
    answer = json.loads(said) if isinstance(said, str) else said
    found: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(generated(json.load(sys.stdin))) + "\n")
