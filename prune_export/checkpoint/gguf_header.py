"""Reads and validates the header of a GGUF file: the architecture, and where its tensors lie.

It is read before transformers is asked to do the heavy work, so that a truncated or foreign file is
refused in a moment. Only scalars and strings of the metadata are kept; arrays (a vocabulary) are
stepped over.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from prune_export.errors import CheckpointError, MissingExtra
from prune_export.system.files import open_regular

MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_FORMATS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
                   10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DEEPEST: Final = 4
_MOST: Final = 4_000_000
"""Entries, such as texts of a vocabulary, that are stepped through one by one."""
_MOST_DIMS: Final = 8
_LONGEST_TEXT: Final = 100_000_000
_AGAIN: Final = "the file is damaged or was not fully downloaded: fetch it again"


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` holds scalars and strings; `tensors` the shape of each tensor, outermost first."""

    metadata: Mapping[str, int | float | str]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def parameters(self) -> int:
        """The number of stored values."""
        return sum(prod(shape) for shape in self.tensors.values())


def read_gguf_header(file: Path) -> GgufHeader:
    """Reads the header of `file`, and checks it against the file's length.

    Raises:
        MissingExtra: the gguf package, which knows the sizes of the quantized formats, is missing.
        CheckpointError: the file is not GGUF, truncated, or one part of several.
    """
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingExtra.of(str(file), "gguf", "gguf") from None
    try:
        with (
            open_regular(file, None, "a GGUF file") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            size = len(data)
            cursor = _Cursor(data, file)
            metadata, infos = _read(cursor)
    except (OSError, ValueError) as error:  # mmap answers ValueError to an empty file
        raise CheckpointError(str(file), f"cannot be read as GGUF: {error}", _AGAIN) from None
    parts = _natural(file, metadata, "split.count", 1)
    if parts > 1:
        raise CheckpointError(
            str(file),
            f"is one of {parts} parts, expected a whole model",
            "join the parts with llama.cpp's `llama-gguf-split --merge FIRST OUT`",
        )
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(str(file), "does not name its general.architecture", _AGAIN)
    align = _natural(file, metadata, "general.alignment", 32, least=1)
    begin = -(-cursor.at // align) * align
    for name, (shape, kind, offset) in infos.items():
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise CheckpointError(
                f"{file}  {name}",
                f"got tensor type {kind}, which the installed gguf package does not know",
                "update it: `pip install -U gguf`",
            ) from None
        stop = begin + offset + prod(shape) // block * block_bytes
        if stop > size:
            raise CheckpointError(
                f"{file}  {name}",
                f"ends at byte {stop}, but the file is truncated at {size}",
                _AGAIN,
            )
    return GgufHeader(metadata, {name: shape for name, (shape, _, _) in infos.items()})


def _natural(
    file: Path, metadata: Mapping[str, int | float | str], key: str, default: int, least: int = 0
) -> int:
    """Reads a whole number of the metadata, whatever its type there."""
    found = metadata.get(key, default)
    if type(found) is not int or not least <= found < 2**31:
        raise CheckpointError(
            f"{file}  {key}",
            f"got {found!r:.60}, expected a whole number of {least} or more",
            _AGAIN,
        )
    return found


_Infos = dict[str, tuple[tuple[int, ...], int, int]]


def _read(cursor: _Cursor) -> tuple[dict[str, int | float | str], _Infos]:
    magic = cursor.take(4)
    if magic != MAGIC:
        raise CheckpointError(
            str(cursor.file), f"begins with {magic!r}, expected {MAGIC!r}", "give a GGUF file"
        )
    version = int(cursor.number(4))
    if version not in _VERSIONS:
        raise CheckpointError(
            str(cursor.file),
            f"is GGUF version {version}, expected one of {list(_VERSIONS)} (little endian)",
            "convert it with a current llama.cpp",
        )
    tensor_count, pair_count = cursor.count(), cursor.count()
    metadata: dict[str, int | float | str] = {}
    for _ in range(pair_count):
        key = cursor.text()
        found = cursor.value(int(cursor.number(4)))
        if found is not None:
            metadata[key] = found
    infos: _Infos = {}
    for _ in range(tensor_count):
        name = cursor.text()
        dims = int(cursor.number(4))
        if dims > _MOST_DIMS:
            raise cursor.damaged(f"{dims} dimensions of {name[:60]!a}, at most {_MOST_DIMS} are")
        sizes = [int(cursor.number(10)) for _ in range(dims)]
        infos[name] = (tuple(reversed(sizes)), int(cursor.number(4)), int(cursor.number(10)))
    return metadata, infos


class _Cursor:
    """Steps through a file's bytes and never past their end."""

    def __init__(self, data: mmap.mmap, file: Path) -> None:
        self.data = data
        self.file = file
        self.at = 0

    def take(self, count: int) -> bytes:
        start = self.at
        self._skip(count)  # first, or a wrong count would copy the whole file
        return self.data[start : self.at]

    def number(self, kind: int) -> int | float:
        found: int | float = struct.unpack(
            _FORMATS[kind], self.take(struct.calcsize(_FORMATS[kind]))
        )[0]
        return found

    def text(self) -> str:
        length = int(self.number(10))
        if length > _LONGEST_TEXT:
            raise self.damaged(f"a text of {length} bytes, at most {_LONGEST_TEXT} are")
        return self.take(length).decode("utf-8", errors="replace")

    def count(self) -> int:
        """Reads the number of entries that follow."""
        found = int(self.number(10))
        if found > _MOST:
            raise self.damaged(f"{found} entries, at most {_MOST} are")
        return found

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            str(self.file), f"announces {what} allowed (near byte {self.at})", _AGAIN
        )

    def value(self, kind: int, depth: int = 0) -> int | float | str | None:
        """Reads a scalar or a string; skips an array and gives None."""
        if kind in _FORMATS:
            return self.number(kind)
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > _DEEPEST:
            raise CheckpointError(
                str(self.file), f"holds a value of unknown type {kind} at byte {self.at}", _AGAIN
            )
        inner, count = int(self.number(4)), int(self.number(10))
        if inner in _FORMATS:
            self._skip(count * struct.calcsize(_FORMATS[inner]))
            return None
        if count > _MOST:
            raise self.damaged(f"{count} entries, at most {_MOST} are")
        for _ in range(count):
            if inner == _STRING:
                self._skip(int(self.number(10)))
            else:
                self.value(inner, depth + 1)
        return None

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise CheckpointError(
                str(self.file),
                f"is truncated: its header goes on past the end at byte {len(self.data)}",
                _AGAIN,
            )
