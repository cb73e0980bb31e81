"""Numbers in a GGUF header that are none, or without end."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from prune_export.checkpoint import read_gguf_header
from prune_export.errors import CheckpointError

pytest.importorskip("gguf")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(path: Path, *pairs: bytes, tensors: int = 0, rest: bytes = b"") -> Path:
    """A file of a header, with `general.architecture` and the pairs given."""
    every = (pair(b"general.architecture", 8, text(b"llama")), *pairs)
    data = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(every)) + b"".join(every) + rest
    (path / "model.gguf").write_bytes(data + b"\0" * 256)
    return path / "model.gguf"


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (6, struct.pack("<f", math.nan)),
        (6, struct.pack("<f", math.inf)),
        (12, struct.pack("<d", -math.inf)),
        (4, struct.pack("<I", 0)),
        (5, struct.pack("<i", -32)),
        (10, struct.pack("<Q", 2**64 - 1)),
        (7, b"\1"),
        (8, text(b"32")),
        (8, text(b"two")),
    ],
)
def test_an_alignment_is_a_whole_number(tmp_path: Path, kind: int, value: bytes) -> None:
    file = header(tmp_path, pair(b"general.alignment", kind, value))
    with pytest.raises(CheckpointError, match=r"general\.alignment\n.*expected a whole number"):
        read_gguf_header(file)


@pytest.mark.parametrize(
    ("kind", "value"), [(8, text(b"many")), (6, struct.pack("<f", math.nan)), (5, b"\xff" * 4)]
)
def test_the_number_of_parts_is_a_whole_number(tmp_path: Path, kind: int, value: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"split\.count\n.*expected a whole number"):
        read_gguf_header(header(tmp_path, pair(b"split.count", kind, value)))


def test_counts_are_bounded_before_they_are_counted(tmp_path: Path) -> None:
    many = struct.pack("<IQ", 8, 10**9)
    with pytest.raises(CheckpointError, match="entries, at most"):
        read_gguf_header(header(tmp_path, pair(b"tokens", 9, many)))
    with pytest.raises(CheckpointError, match="entries, at most"):
        read_gguf_header(header(tmp_path, tensors=10**9))
    dims = text(b"a") + struct.pack("<I", 2**32 - 1)
    with pytest.raises(CheckpointError, match="dimensions of"):
        read_gguf_header(header(tmp_path, tensors=1, rest=dims))


def test_what_is_plain_passes(tmp_path: Path) -> None:
    found = read_gguf_header(header(tmp_path, pair(b"general.alignment", 4, struct.pack("<I", 64))))
    assert found.architecture == "llama"
