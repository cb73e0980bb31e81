"""Packs weight matrices into the format that `packed.h` describes, and reads them back.

A matrix is `[out, in]`: int8 or int4 codes with a scale for each group of inputs, or bf16. Where
it has zeros, only what is not zero is stored: with a bitmap of 64 inputs a word, or, where at most
two of each four inputs are not zero, with two bits for the place of each.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from prune_export.errors import CheckpointError

Values = Literal["int8", "int4", "bf16"]
Layout = Literal["dense", "bitmap", "two_of_four"]

OPERATOR: Final = "PackedMatMul"
"""The name of the operator that multiplies with packed weights, in the domain `prune_export`."""

MAGIC: Final = b"PEPACKED"
VERSION: Final = 1
CHUNK: Final = 64
_HEADER: Final = struct.Struct("<8s6IQI")
_HEADER_BYTES: Final = 64
_TAIL_BYTES: Final = 64
_VALUES: Final[tuple[Values, ...]] = ("int8", "int4", "bf16")
_LAYOUTS: Final[tuple[Layout, ...]] = ("dense", "bitmap", "two_of_four")
_BIAS: Final = {"int8": 128, "int4": 8}
_BITS: Final = {"int8": 8, "int4": 4, "bf16": 16}
_MOST_GROUP: Final = 1024
_MOST_COLUMNS: Final = 2**22
_MOST_ROWS: Final = 2**26


@dataclass(frozen=True)
class Packed:
    """A packed matrix: what its header says, and all of its bytes, uint8."""

    rows: int
    columns: int
    values: Values
    layout: Layout
    group: int
    data: np.ndarray

    @property
    def bytes_a_weight(self) -> float:
        """The bytes that a product reads for each weight of the matrix, zeros counted as well."""
        return (self.data.size - _HEADER_BYTES - _TAIL_BYTES) / max(self.rows * self.columns, 1)


def takes_group(group: int) -> bool:
    """Whether the kernel has groups of so many inputs: 32, or a multiple of 64 up to 1024."""
    return group == 32 or (0 < group <= _MOST_GROUP and group % CHUNK == 0)


def pack_codes(
    codes: np.ndarray, scales: np.ndarray, group: int, values: Values, layout: Layout | None = None
) -> Packed:
    """Packs signed codes `[out, in]` with float32 scales `[out, groups]`: a weight is a product.

    `layout` is by default the smallest that holds the matrix.

    Raises:
        ValueError: the codes do not fit `values`, the kernel has no such group, or the zeros are
            not those of `layout`.
    """
    rows, columns = codes.shape
    bias = _BIAS[values]
    if not takes_group(group):
        raise ValueError(f"got groups of {group}, expected 32 or a multiple of {CHUNK}")
    if scales.shape != (rows, -(-columns // group)):
        raise ValueError(f"got scales {scales.shape} for codes {codes.shape} in groups of {group}")
    whole = codes.astype(np.int16)
    if whole.size and not (-bias <= whole.min() and whole.max() < bias):
        raise ValueError(f"got codes from {whole.min()} to {whole.max()}, more than {values} holds")
    kept = _filled(whole != 0)
    stored = _filled((whole + bias).astype(np.uint8), bias)
    chosen = layout or smallest_layout(kept, values, group)
    parts = [_bytes(scales.astype("<f4")), *_weights(stored, kept, values, chosen, group)]
    return _assembled((rows, columns), values, chosen, group, parts)


def pack_floats(bits: np.ndarray, layout: Layout | None = None) -> Packed:
    """Packs bf16 weights `[out, in]`, given as their bits in uint16.

    Raises:
        ValueError: the zeros are not those of `layout`.
    """
    kept, stored = _filled(bits & 0x7FFF != 0), _filled(bits.astype("<u2"))
    chosen = layout or smallest_layout(kept, "bf16", 0)
    return _assembled(bits.shape, "bf16", chosen, 0, _weights(stored, kept, "bf16", chosen, 0))


def smallest_layout(kept: np.ndarray, values: Values, group: int) -> Layout:
    """The layout with the fewest bytes for a mask `[out, columns]` of what is not zero.

    Two of four has the bytes of a bitmap or fewer, and is multiplied in fewer steps.
    """
    weights = kept.size
    if _holds_two_of_four(kept) and (values == "bf16" or group >= CHUNK):
        return "two_of_four"
    dense = weights * _BITS[values] / 8
    packed = np.count_nonzero(kept) * _BITS[values] / 8 + weights / 8 + 4 * len(kept)
    return "bitmap" if packed < dense else "dense"


def unpack(packed: Packed | bytes | np.ndarray) -> np.ndarray:
    """The weights float32 `[out, in]` of a packed matrix.

    Raises:
        CheckpointError: it is truncated, damaged, or not what this version writes.
    """
    held = packed if isinstance(packed, Packed) else read(packed)
    scales, offsets, masks, values = _parts(held)
    chunks = _chunks(held.columns)
    size = held.rows * chunks
    kept = np.ones((size, CHUNK), bool)
    if held.layout == "bitmap":
        kept = np.unpackbits(masks, bitorder="little").reshape(size, CHUNK).astype(bool)
        _refuse_other_offsets(held, kept, offsets.view("<u4"))
    elif held.layout == "two_of_four":
        kept = _from_places(masks.reshape(size, -1))
    whole = np.zeros((size, CHUNK), np.float32)
    whole[kept] = _read_values(values, kept.sum(axis=1), held)
    matrix: np.ndarray = whole.reshape(held.rows, chunks * CHUNK)[:, : held.columns]
    if held.group:
        each = scales.view("<f4").reshape(held.rows, -1).repeat(held.group, axis=1)
        matrix = matrix * each[:, : held.columns]
    return matrix


def read(data: bytes | np.ndarray) -> Packed:
    """Reads the header of a packed matrix, and checks that its bytes are whole.

    Raises:
        CheckpointError: it is truncated, damaged, or not what this version writes.
    """
    whole = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    if whole.size < _HEADER_BYTES or whole[:8].tobytes() != MAGIC:
        raise _refusal(f"got {whole.size} bytes that do not start with {MAGIC.decode()}")
    head = _HEADER.unpack(whole[: _HEADER.size].tobytes())
    _, version, rows, columns, values, layout, group, total, checksum = head
    if version != VERSION:
        raise _refusal(f"got version {version}, expected {VERSION}")
    if total != whole.size:
        raise _refusal(f"got {whole.size} bytes, expected the {total} that its header says")
    if values >= len(_VALUES) or layout >= len(_LAYOUTS):
        raise _refusal(f"got values {values} and layout {layout}, which are not known")
    if not (0 <= rows <= _MOST_ROWS and 0 < columns <= _MOST_COLUMNS):
        raise _refusal(f"got {rows} rows of {columns} columns")
    if not (group == 0 if _VALUES[values] == "bf16" else takes_group(group)):
        raise _refusal(f"got groups of {group}")
    if checksum != zlib.crc32(whole[_HEADER_BYTES:].data):
        raise _refusal("its checksum differs")
    return Packed(rows, columns, _VALUES[values], _LAYOUTS[layout], group, whole)


def _refusal(problem: str) -> CheckpointError:
    return CheckpointError("packed weights", problem, "export the engine again")


def _chunks(columns: int) -> int:
    return -(-columns // CHUNK)


def _filled(matrix: np.ndarray, value: int = 0) -> np.ndarray:
    """Fills rows up to whole chunks."""
    return np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % CHUNK)), constant_values=value)


def _holds_two_of_four(kept: np.ndarray) -> bool:
    fours = kept.reshape(-1, 4).sum(axis=1, dtype=np.int8)
    return bool(fours.size) and int(fours.max()) <= 2


def _weights(
    stored: np.ndarray, kept: np.ndarray, values: Values, layout: Layout, group: int
) -> list[np.ndarray]:
    """The parts behind the scales: offsets, masks, values."""
    size = stored.size // CHUNK
    chunks = stored.reshape(size, CHUNK)
    if layout == "dense":
        return [_dense(chunks, values)]
    if layout == "bitmap":
        held = kept.reshape(size, CHUNK)
        counts = held.sum(axis=1, dtype=np.int64)
        masks = np.packbits(held, axis=1, bitorder="little")
        lengths = _chunk_bytes(counts, values)
        rows = lengths.reshape(len(stored), stored.shape[1] // CHUNK).sum(axis=1)
        offsets = np.concatenate([[0], rows.cumsum()])
        if offsets[-1] >= 2**32:
            raise ValueError(f"got {offsets[-1]} bytes of values, more than offsets can say")
        return [_bytes(offsets.astype("<u4")), masks.reshape(-1), _ragged(chunks, held, values)]
    if not _holds_two_of_four(kept) or (values != "bf16" and group < CHUNK):
        raise ValueError(
            "got more than two of four, or groups below 64, for the layout two_of_four"
        )
    held = _two_of_each_four(kept).reshape(size, CHUNK)
    places = np.nonzero(held.reshape(-1, 4))[1].astype(np.uint8).reshape(-1, 4)
    words = places[:, 0] | places[:, 1] << 2 | places[:, 2] << 4 | places[:, 3] << 6
    return [words, _ragged(chunks, held, values)]


def _dense(chunks: np.ndarray, values: Values) -> np.ndarray:
    if values == "int4":
        halves = chunks.reshape(-1, 2, CHUNK // 2)
        both: np.ndarray = (halves[:, 0] | halves[:, 1] << 4).reshape(-1)
        return both
    return _bytes(chunks)


def _chunk_bytes(counts: np.ndarray, values: Values) -> np.ndarray:
    return (counts + 1) // 2 if values == "int4" else counts * (_BITS[values] // 8)


def _ragged(chunks: np.ndarray, held: np.ndarray, values: Values) -> np.ndarray:
    """The held values of all chunks, one after the other."""
    flat = chunks[held]
    if values != "int4":
        return _bytes(flat)
    counts = held.sum(axis=1, dtype=np.int64)
    odd = np.flatnonzero(counts % 2)
    flat = np.insert(flat, counts.cumsum()[odd], 0)  # a half byte is filled up
    both: np.ndarray = flat[0::2] | flat[1::2] << 4
    return both


def _read_values(data: np.ndarray, counts: np.ndarray, held: Packed) -> np.ndarray:
    """The codes or weights of all chunks, float32."""
    if held.values == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if held.values == "int8":
        return data.astype(np.float32) - _BIAS["int8"]
    if held.layout == "dense":
        rows = data.reshape(-1, CHUNK // 2)
        flat = np.concatenate([rows & 15, rows >> 4], axis=1).reshape(-1)
    else:
        flat = np.stack([data & 15, data >> 4], axis=1).reshape(-1)
        odd = counts % 2 == 1
        flat = np.delete(flat, (counts + counts % 2).cumsum()[odd] - 1)
    return flat.astype(np.float32) - _BIAS["int4"]


def _two_of_each_four(kept: np.ndarray) -> np.ndarray:
    """Adds to a mask the first places of each four until two are held."""
    fours = kept.reshape(-1, 4)
    order = np.argsort(~fours, axis=1, kind="stable")[:, :2]  # what is held comes first
    held = np.zeros_like(fours)
    np.put_along_axis(held, order, True, axis=1)
    return held.reshape(kept.shape)


def _from_places(words: np.ndarray) -> np.ndarray:
    """The mask `[chunks, 64]` of places, uint8 `[chunks, 8]`."""
    two = np.stack([words >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(-1, 2)
    if not (two[:, 0] < two[:, 1]).all():
        raise _refusal("places of two of four are not in order")
    held = np.zeros((len(two), 4), bool)
    np.put_along_axis(held, two.astype(np.int64), True, axis=1)
    return held.reshape(-1, CHUNK)


def _refuse_other_offsets(held: Packed, kept: np.ndarray, offsets: np.ndarray) -> None:
    lengths = _chunk_bytes(kept.sum(axis=1, dtype=np.int64), held.values)
    rows = lengths.reshape(held.rows, _chunks(held.columns)).sum(axis=1)
    if not np.array_equal(offsets, np.concatenate([[0], rows.cumsum()])):
        raise _refusal("rows have other numbers of values than their masks")


def _parts(held: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scales, offsets, masks and values, uint8."""
    chunks = _chunks(held.columns)
    groups = -(-held.columns // held.group) if held.group else 0
    sizes = [
        4 * held.rows * groups,
        4 * (held.rows + 1) if held.layout == "bitmap" else 0,
        8 * held.rows * chunks if held.layout != "dense" else 0,
    ]
    at, found = _HEADER_BYTES, []
    for size in sizes:
        found.append(held.data[at : at + size])
        at += size + -size % 64
    values = held.data[at : held.data.size - _TAIL_BYTES]
    if at > held.data.size - _TAIL_BYTES or values.size != _expected(held, chunks, found[2]):
        raise _refusal("it holds another number of values than its header says")
    return found[0], found[1], found[2], values


def _expected(held: Packed, chunks: int, masks: np.ndarray) -> int:
    """The bytes of all values."""
    size = held.rows * chunks
    if held.layout == "bitmap":
        counts = np.unpackbits(masks).reshape(size, CHUNK).sum(axis=1, dtype=np.int64)
    else:
        counts = np.full(size, CHUNK if held.layout == "dense" else CHUNK // 2)
    return int(_chunk_bytes(counts, held.values).sum())


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _assembled(
    shape: tuple[int, ...], values: Values, layout: Layout, group: int, parts: list[np.ndarray]
) -> Packed:
    """Puts the parts behind each other, each but the values filled up to 64 bytes."""
    rows, columns = shape
    *before, last = parts
    pieces = [np.pad(part, (0, -part.size % 64)) for part in before]
    body = np.concatenate([*pieces, last, np.zeros(_TAIL_BYTES, np.uint8)])
    total = _HEADER_BYTES + body.size
    kinds = _VALUES.index(values), _LAYOUTS.index(layout)
    head = _HEADER.pack(
        MAGIC, VERSION, rows, columns, *kinds, group, total, zlib.crc32(body.data)
    ).ljust(_HEADER_BYTES, b"\0")
    data = np.concatenate([np.frombuffer(head, np.uint8), body])
    return Packed(rows, columns, values, layout, group, data)
