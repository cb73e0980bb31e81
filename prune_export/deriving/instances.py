"""Random models of a config: made in memory, saved as a checkpoint, loaded as a stranger would."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from prune_export.arch import Arch
from prune_export.arch.table import Table
from prune_export.checkpoint.loading import load_config, load_model

FILE: Final = "model.safetensors"
NO_ENDS: Final = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""No token of a random model ends a text."""

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Instance:
    """A random model, where it is saved, its config with defaults filled in, and its Arch."""

    model: Any
    path: Path
    full: dict[str, Any]
    arch: Arch

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits `[samples, length, vocab]` of the whole model."""
        return logits(self.model, ids)

    def state(self) -> State:
        """The stored tensors, by their names on disk."""
        return dict(load_file(self.path / FILE))


def prompt(vocabulary: int) -> torch.Tensor:
    """Two windows of 12 random ids: what random models are compared on."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, min(vocabulary, 64), (2, 12), generator=generator)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[samples, length, vocab]` of a model, computed without a cache."""
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
        return found


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps transformers' advice about odd configs, and its progress bars, to itself."""
    from transformers.utils import logging as bars

    noise = logging.getLogger("transformers")
    level, shown = noise.level, bars.is_progress_bar_enabled()
    noise.setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        noise.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def config_class(model_type: str) -> Any:
    """The configuration class of a model type that transformers, or this process, has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def build(config: Mapping[str, Any], device: str = "cpu") -> Any:
    """Makes the model of a config, never with code from elsewhere; on `meta` it holds no values."""
    from transformers import AutoModelForCausalLM

    plain = {key: value for key, value in config.items() if key != "auto_map"}
    made = config_class(str(config["model_type"])).from_dict(plain)
    with quietly(), torch.device(device):
        return AutoModelForCausalLM.from_config(
            made, dtype=torch.float32, trust_remote_code=False
        ).eval()


def randomize(model: Any) -> None:
    """Makes every parameter random, so that none is a zero that hides a mistake."""
    stored = model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # In wide models less, or attention would look at one position only.
                parameter.normal_(std=0.6 * min(1.0, (64 / parameter.shape[-1]) ** 0.5))
            else:
                parameter.normal_(std=0.3).add_(0.5)
        for name, buffer in model.named_buffers():
            if buffer.dim() and name in stored and buffer.is_floating_point():
                buffer.normal_(std=0.3)


def random_instance(config: Mapping[str, Any], path: Path, table: Table | None = None) -> Instance:
    """Makes and saves a random model of a config; its Arch is of `table`, or of a known one.

    The model is the saved one, read again: the layout of fused experts in memory moves the last
    bits of their products, and cut models are read from files too.
    """
    torch.manual_seed(0)
    model = build({**NO_ENDS, **config})
    randomize(model)
    with quietly():
        model.save_pretrained(path)
    model, _ = load(path)
    full = load_config(path).to_dict()
    return Instance(model, path, full, Arch.from_config(full, table=table))


def write(state: Mapping[str, torch.Tensor], config: Mapping[str, Any], out: Path) -> Path:
    """Writes a checkpoint of stored tensors and a config."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, out / FILE, {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


def load(path: Path) -> tuple[Any, list[str]]:
    """Loads a checkpoint with stock transformers; with it what did not fit, in words."""
    with quietly():
        model, report = load_model(path, dtype=torch.float32, output_loading_info=True)
    wrong = [
        f"{what}: {', '.join(sorted(map(str, names))[:3])}"
        for what, names in report.items()
        if names
    ]
    return model.eval(), wrong
