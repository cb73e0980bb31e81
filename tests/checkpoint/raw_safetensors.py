"""Writes safetensors files by hand, so that a test can get every byte of them wrong."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a file."""
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write(file: Path, header: Mapping[str, Any] | bytes, data: bytes) -> None:
    """A file with this header, JSON or bytes, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
