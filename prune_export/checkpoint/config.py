"""Reads config.json as data, and fills in transformers' defaults. Its code is never run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

from prune_export.checkpoint.filled import keep_config, kept_config
from prune_export.errors import CheckpointError, UnsupportedArch, did_you_mean
from prune_export.modeling import register
from prune_export.system.files import read_json_object

_MOST_LAYERS: Final = 10_000
_MOST_LABELS: Final = 100_000
_LARGEST: Final = 2**63
_NESTED: Final = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, is far too long or deep, or is no JSON object.
    """
    return read_json_object(file)


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json of a model directory, its keys in their order.

    Raises:
        CheckpointError: there is none, it is not an object, or it says that weights are quantized.
    """
    file = path / "config.json"
    if not file.exists():
        adapter = (path / "adapter_config.json").exists()
        raise CheckpointError(
            str(file),
            "is missing" + ("; the directory holds a PEFT adapter" if adapter else ""),
            "merge the adapter into its base model first (`merge_and_unload`)"
            if adapter
            else "give a directory that transformers' `save_pretrained` wrote",
        )
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{file}  model_type",
            f"got {config.get('model_type')!r:.60}, expected the name of a model type",
            'write it, for example `"model_type": "llama"`',
        )
    if config.get("quantization_config"):
        how = config["quantization_config"]
        named = how.get("quant_method") if isinstance(how, dict) else None
        raise CheckpointError(
            f"{file}  quantization_config",
            f"the weights are quantized ({named or 'unknown method'}), expected plain floats",
            "`prune-export run` dequantizes it first; from Python, `checkpoint.import_packed`"
            if named in ("fp8", "mxfp4")
            else "start from the unquantized model; quantize at export, after the pruning",
        )
    return config


def _refuse_counts(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses numbers so large that a configuration class would exhaust time or memory on them.

    Raises:
        CheckpointError: naming the key.
    """
    for key, value in config.items():
        most = _MOST_LAYERS if "layer" in key else _MOST_LABELS if "label" in key else _LARGEST
        if type(value) is int and abs(value) > most:
            raise CheckpointError(
                f"{file}  {key}",
                f"got a number of {value.bit_length()} bits, expected at most {most:,}",
                "the config is damaged: fetch it again",
            )


def _with_floats(value: Any) -> Any:
    """Turns `{"__float__": "Infinity"}`, as transformers writes what JSON lacks, into floats."""
    if isinstance(value, list):
        return [_with_floats(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _with_floats(entry) for key, entry in value.items()}


def full_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fills in transformers' defaults; gives a plain dict.

    Only configuration classes that transformers ships, or that this process registered, are used;
    `auto_map` is ignored.

    Raises:
        UnsupportedArch: transformers does not know the model type, or it is a multimodal wrapper
            that no line of `arch/wrappers.yaml` describes.
        CheckpointError: transformers refuses the values.
    """
    file = path / "config.json"
    model_type = str(config.get("model_type"))
    nested = next((key for key in _NESTED if isinstance(config.get(key), dict)), None)
    if nested is not None:
        inner = config[nested].get("model_type", "text model")
        raise UnsupportedArch(
            f"{file}  {nested}",
            f"{model_type!r} wraps a language model ({inner}) in a larger one, "
            "expected a plain causal language model",
            "save the language model alone with transformers "
            "(`AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(OUT)`), and use that",
        )
    return filled_config(config, path)


def filled_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Fills in transformers' defaults, of plain models and of larger ones that hold one.

    Raises:
        UnsupportedArch: transformers does not know the model type.
        CheckpointError: transformers refuses the values.
    """
    file = path / "config.json"
    model_type = str(config.get("model_type"))
    _refuse_counts(file, config)
    for key in (*_NESTED, "vision_config"):
        if isinstance(config.get(key), dict):
            _refuse_counts(file, config[key])
    # A copy: some configuration classes write into the lists and tables that they are given.
    plain = deepcopy({key: value for key, value in config.items() if key != "auto_map"})
    if (kept := kept_config(plain)) is not None:
        return kept
    # Imported here: transformers brings torch, and opening a checkpoint must stay cheap.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register()
    if model_type not in CONFIG_MAPPING:
        remote = " (it brings code of its own, which is never run)" if "auto_map" in config else ""
        raise UnsupportedArch(
            f"{file}  model_type",
            f"got {model_type!r}, which this transformers does not know{remote}",
            did_you_mean(model_type, CONFIG_MAPPING.keys()),
        )
    # transformers logs advice about odd values; what matters is refused by the tables.
    noise = logging.getLogger("transformers")
    level = noise.level
    noise.setLevel(logging.ERROR)
    try:
        made_by = CONFIG_MAPPING[model_type]
        filled = made_by.from_dict(_with_floats(plain)).to_dict()
    except Exception as error:
        # Whatever a configuration class raises on odd values, they are the file's fault.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            str(file),
            f"transformers refuses it: {' '.join(line.strip() for line in reason)}",
            "correct the value, or fetch the file again",
        ) from error
    finally:
        noise.setLevel(level)
    keep_config(plain, filled, made_by)
    return dict(filled)
