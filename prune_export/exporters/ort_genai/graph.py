"""Counts the weight bytes that one decode step reads, from the graph alone, and the embedding's."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Final

from prune_export.arch import Arch

_LOOKUPS: Final = frozenset({"Gather", "GatherBlockQuantized"})
_SAME_BYTES: Final = frozenset({"Reshape", "Transpose", "Identity", "Cast"})
_ROTARY: Final = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
"""Inputs that hold the cosines and sines of all positions; a step reads one row of them."""


def decode_bytes(graph: Path) -> int:
    """Sums the bytes of the initializers that every step reads whole.

    A table that is only looked up (the embedding, unless it is the head too) does not count.
    """
    import onnx

    loaded = onnx.load(str(graph), load_external_data=False).graph
    users: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in loaded.node:
        for place, name in enumerate(node.input):
            users[name].append((node, place))
    return sum(_size(tensor) for tensor in loaded.initializer if _read_whole(tensor.name, users))


def _read_whole(name: str, users: dict[str, list[tuple[Any, int]]]) -> bool:
    for node, place in users[name]:
        if node.op_type in _LOOKUPS or place in _ROTARY.get(node.op_type, ()):
            continue
        if node.op_type in _SAME_BYTES:
            if _read_whole(node.output[0], users):
                return True
            continue
        return True
    return False


def _size(tensor: Any) -> int:
    for entry in tensor.external_data:
        if entry.key == "length":
            return int(entry.value)
    return len(tensor.raw_data) or tensor.ByteSize()


def embedding_bytes(arch: Arch, bits: int, bits_a_weight: float) -> int:
    """What an embedding takes more than its share of codes: the builder keeps it in fp32.

    Only one that is tied to an int4 head is read from the head's codes.
    """
    if not bits:
        return 0
    size = arch.sizes["vocab"] * arch.sizes["residual"]
    if any(tensor.tied_to for tensor in arch.tensors):
        return 0 if bits == 4 else 4 * size
    return int((4 - bits_a_weight / 8) * size)
