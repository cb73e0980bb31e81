"""Runs a model in GPTQ's layout with PyTorch: weights are unpacked once, and multiplied dense."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from prune_export.errors import CheckpointError
from prune_export.exporters.gptq_format.layout import PARTS, unpacked
from prune_export.machine import Machine
from prune_export.system.files import read_json_object

CONFIG = "config.json"


class GptqRunner:
    """A `contracts.Runner` over transformers' model with unpacked weights, on the CPU."""

    def __init__(self, path: Path, machine: Machine) -> None:
        torch.set_num_threads(machine.threads)
        self._model: Any = _loaded(path)
        self._cache: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model = self._cache = None

    def reset(self) -> None:
        """Empties the KV cache."""
        self._cache = None

    def step(self, ids: np.ndarray) -> tuple[np.ndarray, float]:
        """Runs `ids` int64 `[batch, new]` after the tokens in the cache."""
        fed = torch.from_numpy(np.ascontiguousarray(ids))
        start = perf_counter()
        with torch.inference_mode():
            found = self._model(input_ids=fed, past_key_values=self._cache, use_cache=True)
        seconds = perf_counter() - start
        self._cache = found.past_key_values
        logits: np.ndarray = found.logits.float().numpy()
        return logits, seconds


def _loaded(path: Path) -> Any:
    """The model with its weights unpacked to float32.

    Raises:
        CheckpointError: config.json does not describe codes in GPTQ's layout.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    how = read_json_object(path / CONFIG, "a model's configuration").get("quantization_config")
    bits = how.get("bits") if isinstance(how, dict) else None
    if bits not in (4, 8):
        raise CheckpointError(
            f"{path / CONFIG}  quantization_config.bits",
            f"got {bits!r:.40}, expected 4 or 8",
            "export the engine again",
        )
    assert isinstance(how, dict)
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    del config.quantization_config
    config.dtype = torch.float32
    less_one = how.get("checkpoint_format") != "gptq_v2"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    rules = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    stored = _state(path, bits, less_one=less_one)
    state = {str(rename_source_key(name, rules, [])[0]): value for name, value in stored.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def _state(path: Path, bits: int, *, less_one: bool) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    found: dict[str, torch.Tensor] = {}
    for name, value in stored.items():
        stem, _, part = name.rpartition(".")
        if part not in PARTS:
            found[name] = value.float()
        elif part == "qweight":
            parts = {part: stored[f"{stem}.{part}"] for part in PARTS}
            found[f"{stem}.weight"] = unpacked(parts, bits, less_one=less_one)
    return found
