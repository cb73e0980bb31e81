"""GGUF files in: their config without a weight read, and a plain checkpoint of one, dequantized once.

transformers reads the format and maps names; what this adds is refusing early and saying why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch
from prune_export.errors import CheckpointError, MissingExtra, UnsupportedArch
from prune_export.progress import Progress, Silent

_MAGIC: Final = b"GGUF"
_NAME_KEYS: Final = ("_name_or_path", "_model_name_or_path")


def gguf_config(file: Path) -> dict[str, Any]:
    """The transformers config of a GGUF file, as a dict, from its metadata alone.

    Raises:
        MissingExtra: the package `gguf` is not installed.
        CheckpointError: the file is not GGUF, or is cut short.
        UnsupportedArch: transformers cannot read this architecture from GGUF.
    """
    _refuse_what_is_not_whole(file)
    from transformers import AutoConfig

    try:
        with _silence():
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError) as error:
        raise UnsupportedArch(
            str(file),
            f"transformers cannot read it: {str(error).splitlines()[0]}",
            "start from the model's safetensors, or another GGUF of it",
        ) from None
    found: dict[str, Any] = config.to_dict()
    for key in _NAME_KEYS:
        found.pop(key, None)
    return found


def import_gguf(file: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes the plain float32 checkpoint of a GGUF file, with its tokenizer, into `out`.

    Raises:
        MissingExtra: the package `gguf` is not installed.
        CheckpointError: the file is not GGUF, is cut short, or its weights do not fit its config.
        UnsupportedArch: neither transformers nor the architecture tables know the model.
    """
    Arch.from_config(gguf_config(file))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with (progress or Silent()).task("dequantize", 3) as task, _silence():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        task.advance()
        model.save_pretrained(out)
        task.advance()
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
        task.advance()
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for key in _NAME_KEYS:
        config.pop(key, None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    mask = os.umask(0)
    os.umask(mask)
    for written in out.iterdir():
        written.chmod(0o666 & ~mask)


def _refuse_what_is_not_whole(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra.of(str(file), "gguf", "gguf")
    with file.open("rb") as stream:
        magic = stream.read(8)
    if magic[:4] != _MAGIC or len(magic) < 8:
        raise CheckpointError(
            str(file), f"starts with {magic[:4]!r}, expected {_MAGIC!r}", "is this a GGUF file?"
        )
    (version,) = struct.unpack("<I", magic[4:])
    if version not in (2, 3):
        raise CheckpointError(
            str(file), f"is of GGUF version {version}, expected 2 or 3", "convert it again"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise CheckpointError(
            str(file),
            f"cannot be read: {error}",
            "the file is cut short or damaged; fetch it again",
        ) from None
    if not end or end > file.stat().st_size:
        raise CheckpointError(
            str(file),
            f"has {file.stat().st_size:,} bytes, its tensors end at {end:,}",
            "the file is cut short; fetch it again",
        )


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps the bars that transformers draws while it reads GGUF off the terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
