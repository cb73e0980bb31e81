"""Run as a script in an isolated interpreter: does stock transformers load this directory?

    python -I reload_child.py DIRECTORY RAM_BYTES [own-code]

A plain model is loaded with AutoModelForCausalLM, one of images and text with its own class.
It must not import prune_export: a user who downloads the checkpoint has none. Prints one JSON line,
what `check` returns. A model that does not fit into RAM_BYTES is loaded with its weights left on
disk (accelerate), and generates 4 tokens instead of 16. With `own-code` the code beside it is run:
the caller has made sure that it is prune_export's own.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def check(directory: Path, ram_bytes: int, *, own_code: bool = False) -> dict[str, Any]:
    """Loads `directory` and generates; gives what was found, as JSON types."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(
        directory, local_files_only=True, trust_remote_code=own_code
    )
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    widened = stored if config.dtype == torch.float32 else 2 * stored
    whole = widened <= 0.8 * ram_bytes
    with tempfile.TemporaryDirectory(prefix="prune-export-") as offload:
        # float32 where it fits: in 16 bits a cached and an uncached step may differ by a rounding.
        placement: dict[str, Any] = (
            {"dtype": torch.float32}
            if whole
            else {
                "dtype": "auto",
                "device_map": "auto",
                "max_memory": {"cpu": int(0.5 * ram_bytes)},
                "offload_folder": offload,
            }
        )
        own: Any = AutoModelForCausalLM
        listed = type(config) in own._model_mapping or own_code
        if config.get_text_config() is not config or not listed:
            own = getattr(transformers, config.architectures[0])
            if not (isinstance(own, type) and issubclass(own, transformers.PreTrainedModel)):
                raise ValueError(f"config.json  architectures: {own!r:.80} is no model class")
        model, info = own.from_pretrained(
            directory,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=own_code,
            adapter_kwargs={"subfolder": "\0"},  # no PEFT adapter beside it is picked up
            **placement,
        )
        model.eval()
        return {
            "model_type": config.model_type,
            "missing": sorted(map(str, info["missing_keys"])),
            "unexpected": sorted(map(str, info["unexpected_keys"])),
            "mismatched": sorted(str(key[0]) for key in info["mismatched_keys"]),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "whole": whole,
            "cache_differs_at": cache_difference(model, 16 if whole else 4),
        }


def cache_difference(model: Any, new: int) -> int | None:
    """Finds the first of `new` greedy tokens where cached and uncached logits differ, or None.

    Both are asked after the same tokens, so that a tie can't send them apart. The logits may differ
    by what another order of summation does.
    """
    import torch

    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 9)[None] % vocabulary
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.2
    cache, fed = None, tokens
    with torch.inference_mode():
        for at in range(new):
            output = model(input_ids=fed, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            cached = output.logits[0, -1].float()
            uncached = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
            if not torch.isfinite(cached).all():
                return at
            if (cached - uncached).abs().max() > tolerance * max(1.0, float(uncached.std())):
                return at
            fed = uncached.argmax()[None, None]
            tokens = torch.cat([tokens, fed], dim=1)
    return None


if __name__ == "__main__":
    found = check(Path(sys.argv[1]), int(sys.argv[2]), own_code="own-code" in sys.argv[3:])
    foreign = sorted(name for name in sys.modules if name.split(".")[0] == "prune_export")
    print(json.dumps({**found, "foreign": foreign}), flush=True)
