"""Looks for credentials in files that are about to leave this machine."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from prune_export.errors import PublishError
from prune_export.system.files import open_regular

_BEGIN: Final = rb"(?:\b|(?<=\n[\x10-\x7f]))"
"""Where a word begins; in a vocabulary of protobuf the length of the text stands before it."""

_SECRETS: Final = {
    "a Hugging Face token": _BEGIN + rb"(?:hf|api_org)_[A-Za-z0-9]{20,}\b",
    "a GitHub token": _BEGIN + rb"(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,})\b",
    "an AWS access key": _BEGIN + rb"AKIA[0-9A-Z]{16}\b",
    "an API key": rb"\b(?:sk|nvapi|xox[abprs])-[A-Za-z0-9_-]{24,}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_CHUNK: Final = 1 << 22
_OVERLAP: Final = 256
_RAW: Final = (".onnx_data", ".onnx.data")
"""Weights without a word beside them: not looked through for secrets."""


def refuse_secrets(directory: Path, files: Iterable[str], token: str | None) -> None:
    """Refuses a file that holds a credential as text; the error says where, and never what.

    Whatever a file is called: a tokenizer.model, a graph and a picture hold text too, and so does
    the header of a weight file. Only raw weights are left out.
    """
    kinds = dict(_SECRETS)
    if token:
        kinds["the token of this upload"] = re.escape(token.encode())
    patterns = {what: re.compile(pattern) for what, pattern in kinds.items()}
    for name in files:
        if name.endswith(_RAW):
            continue
        for line, text in _chunks(directory / name):
            for what, pattern in patterns.items():
                if match := pattern.search(text):
                    where = line + text.count(b"\n", 0, match.start())
                    raise PublishError(
                        f"{directory / name}:{where}",
                        f"holds what looks like {what}",
                        "remove it and revoke it; nothing was uploaded",
                    )


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (first line number, bytes) of overlapping pieces, so that no match is cut in two.

    Of safetensors only the header; of UTF-16 the ASCII in it.
    """
    line, tail = 1, b""
    with open_regular(path, error=PublishError) as file:
        start = file.read(8)
        wide = start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        left = int.from_bytes(start, "little") if path.suffix == ".safetensors" else None
        file.seek(0 if left is None else len(start))
        while block := file.read(_CHUNK if left is None else min(_CHUNK, left)):
            left = left if left is None else left - len(block)
            text = tail + (block.replace(b"\0", b"") if wide else block)
            yield line, text
            tail = text[-_OVERLAP:]
            line += text.count(b"\n", 0, len(text) - len(tail))
