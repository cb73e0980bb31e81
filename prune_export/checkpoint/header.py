"""Reads, validates and writes the header of a safetensors file.

A file is eight bytes of length, a JSON header of that length, and the tensors' bytes. Everything
that the format promises is checked here, because a tool that later copies ranges of bytes must be
able to trust them.

Source: https://github.com/huggingface/safetensors, README "Format".
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from prune_export.errors import CheckpointError, did_you_mean
from prune_export.system.files import open_regular

BITS: Final[Mapping[str, int]] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
"""Bits an element, by the format's dtype names."""

TORCH: Final[Mapping[str, str]] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip
"""The names of the torch dtypes; packed formats have none."""

FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ",
                           "F8_E5M2FNUZ"})  # fmt: skip
"""What a plain, unquantized weight may be."""

LONGEST_HEADER_BYTES: Final = 100_000_000
"""The bound that the reference implementation sets too."""

_MOST_DIMS: Final = 64
_AGAIN = "the file is damaged or was not fully downloaded: fetch or write it again"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `file`, bytes `[start, stop)` in it, its dtype name and shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The tensor's bytes."""
        return self.stop - self.start


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor.

    Raises:
        ValueError: a packed dtype whose elements do not fill whole bytes.
    """
    bits = BITS[dtype] * prod(shape)
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} does not fill whole bytes")
    return bits // 8


def read_header(file: Path) -> dict[str, Entry]:
    """Reads the header of a safetensors file: its tensors, in the order of their bytes.

    Raises:
        CheckpointError: the file is not exactly what the format allows.
    """
    header, data = _raw_header(file)
    size = file.stat().st_size
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(
            f"{file}  __metadata__", "is not an object of strings, as the format wants", _AGAIN
        )
    found = {name: _entry(file, name, row, data) for name, row in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)))
    at, before = data, "the header"
    for name, entry in ordered.items():
        if entry.start != at:
            what = "overlaps" if entry.start < at else "leaves a gap after"
            raise CheckpointError(
                f"{file}  {name}",
                f"starts at byte {entry.start - data} and {what} {before}, "
                f"which ends at {at - data}",
                _AGAIN,
            )
        at, before = entry.stop, name
    if at != size:
        state = "is truncated" if size < at else "has bytes after its last tensor"
        raise CheckpointError(
            str(file), f"{state}: got {size} bytes, the header describes {at}", _AGAIN
        )
    return ordered


def _raw_header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and the byte at which the tensors begin."""
    with open_regular(file, None, "a safetensors file") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                str(file), f"got {len(prefix)} bytes, expected at least the 8 of a header", _AGAIN
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > LONGEST_HEADER_BYTES:
            raise CheckpointError(
                str(file),
                f"announces a header of {length} bytes, at most {LONGEST_HEADER_BYTES} are allowed",
                "this is not a safetensors file; convert the model with transformers "
                "(`save_pretrained`)",
            )
        if 8 + length > size:
            raise CheckpointError(
                str(file),
                f"is truncated: announces a header of {length} bytes, the file has {size}",
                _AGAIN,
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except _DuplicateError as error:
        raise CheckpointError(
            str(file), f"its header names {error} twice, expected each name once", _AGAIN
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(file), f"its header is not JSON: {error}", _AGAIN) from None
    if not isinstance(header, dict):
        raise CheckpointError(
            str(file), f"its header is a JSON {type(header).__name__}, expected an object", _AGAIN
        )
    return header, 8 + length


class _DuplicateError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateError(key)
        found[key] = value
    return found


def _entry(file: Path, name: str, row: object, data: int) -> Entry:
    where = f"{file}  {name}"
    if not name.isprintable():
        raise CheckpointError(f"{file}  {name!a}", "is not a name that can be printed", _AGAIN)
    if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            where, f"got {_short(row)}, expected dtype, shape and data_offsets", _AGAIN
        )
    dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(
            where,
            f"got dtype {_short(dtype)}, which the safetensors format does not define",
            did_you_mean(_short(dtype), BITS),
        )
    if not _naturals(shape):
        raise CheckpointError(
            where, f"got shape {_short(shape)}, expected a list of sizes that are 0 or more", _AGAIN
        )
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            where, f"got data_offsets {_short(offsets)}, expected [start, stop]", _AGAIN
        )
    start, stop = offsets
    wanted = BITS[dtype] * prod(shape)
    if wanted != 8 * (stop - start):
        raise CheckpointError(
            where,
            f"covers {stop - start} bytes, {dtype} {list(shape)} takes {-(-wanted // 8)}",
            _AGAIN,
        )
    return Entry(file, dtype, tuple(shape), data + start, data + stop)


def _naturals(found: object) -> bool:
    """Whether a JSON value is a list of sizes or offsets, not too long to print."""
    return (
        isinstance(found, list)
        and len(found) <= _MOST_DIMS
        and all(type(item) is int and 0 <= item < 2**63 for item in found)
    )


def _short(found: object) -> str:
    """Shortens a value of the header for an error message."""
    return ascii(found)[:80]
