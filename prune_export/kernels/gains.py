"""What leaving out zeros can gain on this machine: bytes, and how fast a core takes weights apart.

A product of one token waits for memory or for the core, whichever is slower. Zeros make its bytes
fewer and not its weights, so they help while a core gets less than it can take apart.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import numpy as np

from prune_export.errors import PlanError
from prune_export.kernels.packing import Values

Instructions = Literal["avx512", "avx2", "portable"]

_NEEDED: Final[tuple[tuple[Instructions, frozenset[str]], ...]] = (
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512_vbmi2", "avx512_vnni"})),
    ("avx2", frozenset({"avx2", "fma"})),
)
_NAMES: Final = {
    "avx512": "AVX-512 with VBMI2 and VNNI", "avx2": "AVX2", "portable": "plain loops",
}  # fmt: skip
_BITS: Final = {"int8": 8, "int4": 4, "bf16": 16}
_DENSE: Final = {
    "avx512": {"int8": 58.0, "int4": 75.0, "bf16": 34.0},
    "avx2": {"int8": 38.0, "int4": 36.0, "bf16": 24.0},
    "portable": {"int8": 10.0, "int4": 2.2, "bf16": 1.2},
}
_SPARSE: Final = {
    "avx512": {"int8": 50.0, "int4": 53.0, "bf16": 29.0},
    "avx2": {"int8": 16.0, "int4": 11.0, "bf16": 15.0},
    "portable": {"int8": 0.3, "int4": 0.3, "bf16": 0.3},
}
"""Billion weights a second that one core takes apart and multiplies: an EPYC of Zen 4, measured
with this kernel and one token, matrices in cache where memory would have been slower."""

_PROBED_BYTES: Final = 1 << 26
_TIMES: Final = 4


@dataclass(frozen=True)
class Gain:
    """What zeros gain over the same weights stored dense, as factors of speed.

    `by_bytes` is the most that any machine allows, `here` what is expected of this one, where a
    core reads `core_rate` bytes a second.
    """

    by_bytes: float
    here: float
    core_rate: float
    instructions: Instructions

    def note(self) -> str:
        """A sentence for a plan."""
        return (
            f"at most {self.by_bytes:.2f}x of its zeros stored, by bytes; here about "
            f"{self.here:.2f}x, as a core reads {self.core_rate / 1e9:.0f} GB/s and has "
            f"{_NAMES[self.instructions]}"
        )


def bytes_a_weight(values: Values, block: int, zeros: float) -> float:
    """The bytes of a weight where a fraction `zeros` of them is zero; the smallest layout's."""
    scale = 4 / block if values != "bf16" else 0.0
    dense = _BITS[values] / 8
    return min(dense, dense * (1 - zeros) + 1 / 8) + scale


def packed_as(keys: Mapping[str, Any]) -> tuple[Values, int]:
    """The values and the block that an export with these keys packs in."""
    values: dict[str, Values] = {"int8": "int8", "int4": "int4"}
    return values.get(keys["precision"], "bf16"), keys.get("block_size", 32)


def gain(
    values: Values, block: int, zeros: float, core_rate: float, instructions: Instructions
) -> Gain:
    """What a fraction of `zeros` gains in a product of one token."""
    dense, sparse = (bytes_a_weight(values, block, share) for share in (0.0, zeros))
    slow = max(dense / core_rate, 1e-9 / _DENSE[instructions][values])
    fast = max(sparse / core_rate, 1e-9 / _SPARSE[instructions][values])
    return Gain(dense / sparse, slow / fast, core_rate, instructions)


def beyond_reach(keys: Mapping[str, Any], share: float, wanted: float) -> PlanError | None:
    """Why an export with these keys cannot be `wanted` times as fast by this share of zeros.

    None where bytes allow it: then it is measured.
    """
    values, block = packed_as(keys)
    most = bytes_a_weight(values, block, 0.0) / bytes_a_weight(values, block, share)
    if wanted <= most:
        return None
    return PlanError(
        f"verify.speed.at_least: {wanted:g}",
        f"is more than {share:.0%} zeros can gain in {values}: packed, their matrices have "
        f"{1 / most:.2f} of the bytes, which allows {most:.2f}x",
        f"write `at_least: {1 + (most - 1) / 2:.2g}` or less, prune more, or cut structure as well",
    )


def instructions_of(features: tuple[str, ...]) -> Instructions:
    """The kernel's instruction set on a processor with these features (`machine.cpu_features`)."""
    have = frozenset(features)
    return next((name for name, needed in _NEEDED if needed <= have), "portable")


@cache
def core_rate(threads: int) -> float:
    """The bytes a second that each of `threads` cores reads of memory while all do; about.

    Copies as fast as they go, each byte read and written once; the best of a few, in 0.1 s.
    """
    each = max(_PROBED_BYTES // threads, 1 << 23)
    pairs = [(np.ones(each, np.uint8), np.ones(each, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        np.copyto(*pair)

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_TIMES):
            start = time.perf_counter()
            list(pool.map(copy, pairs))
            best = min(best, time.perf_counter() - start)
    return 2 * each / best
