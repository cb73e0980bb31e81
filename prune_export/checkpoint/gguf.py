"""Converts a GGUF file to a float32 safetensors checkpoint, dequantized by transformers."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import psutil

from prune_export.arch import Arch
from prune_export.arch.table import common, tables
from prune_export.checkpoint.config import full_config
from prune_export.checkpoint.filled import keep_gguf_config, kept_gguf_config
from prune_export.checkpoint.gguf_header import GgufHeader, read_gguf_header
from prune_export.checkpoint.loading import load_model, load_tokenizer
from prune_export.checkpoint.reader import Checkpoint
from prune_export.checkpoint.writer import SHARD_BYTES, Planned, write_checkpoint
from prune_export.errors import CheckpointError, MissingExtra, PlanError, UnsupportedArch
from prune_export.progress import Progress, Silent, Task
from prune_export.system.temporary import Temporary
from prune_export.units import text_from_bytes

_DEAD_KEYS: Final = ("_name_or_path", "_model_name_or_path", "quantization_config")
_DEAD_TOKENIZER_KEYS: Final = ("is_local", "local_files_only", "name_or_path")
_ORIGINAL = "start from the original safetensors model"


def import_gguf(
    file: Path,
    out: Path,
    progress: Progress | None = None,
    *,
    ignore_keys: Collection[str] = (),
    max_shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Writes the model in `file`, with its tokenizer, as a float32 checkpoint.

    The whole model passes through memory once. Numbers such as `rms_norm_eps` stay as GGUF holds
    them, in single precision (9.999999747378752e-06): that is what its engine computes with. The
    same file gives the same bytes.

    Raises:
        MissingExtra: gguf or accelerate is not installed.
        CheckpointError: the file is truncated or not GGUF, or weights are missing from it.
        UnsupportedArch: transformers, or our tables, do not describe the model exactly.
        PlanError: there is not enough memory or disk for it.
    """
    header = read_gguf_header(file)
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra.of(str(file), "accelerate", "gguf")
    told = progress or Silent()
    with ExitStack() as stack:
        task = stack.enter_context(told.task(f"dequantizing {file.name}", len(header.tensors)))
        stack.enter_context(_quiet(task))
        place = stack.enter_context(Temporary())
        arch = Arch.from_config(_config(file, header), ignore_keys=ignore_keys)
        _refuse_small_memory(file, header)
        # Alone in a folder: what lies beside it is not part of it, and would be read.
        alone = place / "gguf" / "model.gguf"
        alone.parent.mkdir()
        alone.symlink_to(file.resolve())
        model = _dequantized(alone, file)
        config = json.loads(model.config.to_json_string())
        config["architectures"] = [type(model).__name__]
        for key in _DEAD_KEYS:
            config.pop(key, None)
        weights = model.state_dict()
        _refuse_difference(file, weights, arch)
        saved = place / "saved"
        _save_tokenizer(alone, saved)
        model.generation_config.save_pretrained(saved)
        return write_checkpoint(
            out,
            config,
            [
                Planned(tensor.name, "F32", arch.shape(tensor), partial(weights.get, tensor.name))
                for tensor in arch.stored()
            ],
            side_files=sorted(saved.iterdir()),
            max_shard_bytes=max_shard_bytes,
            progress=told,
        )


def gguf_config(file: Path) -> dict[str, Any]:
    """Reads the full transformers config of a GGUF file from its header, without weights.

    Raises:
        MissingExtra: gguf is not installed.
        CheckpointError: the file is truncated or not GGUF.
        UnsupportedArch: transformers does not read this model from GGUF, or not exactly.
    """
    kept = kept_gguf_config(file)
    if kept is not None:
        return kept
    header = read_gguf_header(file)
    with _quiet():
        found = _config(file, header)
    keep_gguf_config(file, found)
    return found


def _config(file: Path, header: GgufHeader) -> dict[str, Any]:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        config = load_gguf_checkpoint(str(file.resolve()), return_tensors=False)["config"]
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UnsupportedArch(
            f"{file}  general.architecture",
            f"got {header.architecture!r}, which transformers does not read: {error}",
            _ORIGINAL,
        ) from error
    except Exception as error:
        # Whatever its reader raises on odd metadata, it is the file's fault.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            str(file), f"transformers cannot read its metadata: {reason:.200}", _ORIGINAL
        ) from error
    config = {key: value for key, value in config.items() if key not in _DEAD_KEYS}
    _refuse_ignored_rope(file, header, config)
    _refuse_strange_keys(file, config)
    return full_config(config, file)


def _refuse_strange_keys(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses a config whose keys are not those of its model type.

    transformers' reader gives Falcon's sizes the names that Llama has for them: its class does not
    look at these, and builds a model of its default sizes.
    """
    model_type = str(config.get("model_type"))
    table = tables().get(model_type)
    if table is None:
        return
    strange = sorted(config.keys() - table.keys() - common().keys())
    if strange:
        raise UnsupportedArch(
            f"{file}  {strange[0]}",
            f"transformers reads {', '.join(strange)} from this file, which no {model_type} config "
            "has: it would build a model of other sizes",
            _ORIGINAL,
        )


def _refuse_ignored_rope(file: Path, header: GgufHeader, config: Mapping[str, Any]) -> None:
    """Refuses scaled rotary embeddings, which transformers' GGUF reader ignores silently."""
    if config.get("rope_scaling") or config.get("rope_parameters"):
        return
    scaled = [name for name in header.tensors if name.startswith(("rope_freqs", "rope_factors"))]
    scaled += [
        key
        for key, value in header.metadata.items()
        if key.endswith(".rope.scaling.type") and value not in ("", "none")
    ]
    if scaled:
        raise UnsupportedArch(
            f"{file}  {scaled[0]}",
            "scales the rotary embedding, which transformers does not read from GGUF: long texts "
            "would be computed differently",
            _ORIGINAL,
        )


def _refuse_small_memory(file: Path, header: GgufHeader) -> None:
    # Measured for SmolLM2-135M: 1.8 times its float32 bytes, above Python and torch.
    needed = 2 * 4 * header.parameters
    free = int(psutil.virtual_memory().available)
    if needed > free:
        raise PlanError(
            str(file),
            f"needs about {text_from_bytes(needed)} of memory to be dequantized, "
            f"{text_from_bytes(free)} are available",
            _ORIGINAL,
        )


def _dequantized(alone: Path, file: Path) -> Any:
    import torch
    from transformers import GgufConfig

    model, loaded = load_model(
        alone.parent,
        gguf_file=alone.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{file}  {missing[0]}",
            f"is not in the file ({len(missing)} tensors are missing)",
            _ORIGINAL,
        )
    return model


def _refuse_difference(file: Path, weights: Mapping[str, Any], arch: Arch) -> None:
    for tensor in arch.stored():
        found = weights.get(tensor.name)
        if found is None or tuple(found.shape) != arch.shape(tensor):
            raise CheckpointError(
                f"{file}  {tensor.name}",
                f"got {'nothing' if found is None else list(found.shape)}, "
                f"expected {list(arch.shape(tensor))}",
                _ORIGINAL,
            )


def _save_tokenizer(file: Path, place: Path) -> None:
    tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(place)
    settings = place / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    for key in _DEAD_TOKENIZER_KEYS:
        kept.pop(key, None)
    settings.write_text(
        json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )


@contextmanager
def _quiet(task: Task | None = None) -> Iterator[None]:
    """Silences transformers' bars, advice and warnings, and spares it repeated work.

    transformers parses the header, vocabulary and all, four times, and builds gguf's table of names
    once for each module. Inside this context one parse and one table are shared, which takes half
    of the time away; its bar over the tensors becomes ours.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging as told

    def counted(tensors: Iterable[Any], **_: object) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            if task is not None:
                task.advance()

    noise = logging.getLogger("transformers")
    level, bars = noise.level, told.is_progress_bar_enabled()
    noise.setLevel(logging.ERROR)
    told.disable_progress_bar()
    try:
        with (
            warnings.catch_warnings(),
            _swapped(gguf, "GGUFReader", _shared(gguf.GGUFReader)),
            _swapped(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
            _swapped(reading, "tqdm", counted),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        noise.setLevel(level)
        if bars:
            told.enable_progress_bar()


def _shared(reader: Callable[..., Any]) -> Callable[..., Any]:
    """`reader`, which opens each file once, however it is named."""
    once = cache(reader)

    def opened(path: object, *rest: Any) -> Any:
        return once(os.path.realpath(str(path)), *rest)

    return opened


@contextmanager
def _swapped(module: ModuleType, name: str, value: object) -> Iterator[None]:
    was = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, was)
