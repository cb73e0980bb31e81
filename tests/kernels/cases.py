"""Packed matrices of every kind and awkward shapes, with their weights and products in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from prune_export.kernels import Packed, pack_codes, pack_floats
from prune_export.kernels.packing import Layout, Values

INSTRUCTIONS = ("avx512", "avx2", "portable")
SHAPES = ((1, 1), (3, 64), (5, 65), (17, 200), (24, 576), (2, 1537))
TOKENS = (1, 2, 3, 8, 9, 21)
_GROUPS = {"int8": (32, 64, 128, 256), "int4": (32, 64, 128, 256), "bf16": (0,)}
_BIAS = {"int8": 128, "int4": 8}


@dataclass(frozen=True)
class Case:
    """A packed matrix, its weights float64 `[out, in]`, and activations float32 `[tokens, in]`."""

    packed: Packed
    weights: np.ndarray
    x: np.ndarray

    @property
    def name(self) -> str:
        one = self.packed
        shape = f"{one.rows}x{one.columns}"
        return f"{one.values} {one.layout} {one.group} {shape} {len(self.x)}"

    def expected(self) -> tuple[np.ndarray, float]:
        """The product `[tokens, out]`, and the sum of magnitudes that rounding is relative to."""
        x = rounded(self.x, self.packed.group) if self.packed.group else self.x.astype(np.float64)
        return x @ self.weights.T, float((abs(x) @ abs(self.weights).T).max(initial=1e-30))


def cases(seed: int = 0) -> Iterator[Case]:
    """Every kind of values, layout and group, each with shapes and numbers of tokens in turn."""
    random = np.random.default_rng(seed)
    turn = 0
    for values, groups in _GROUPS.items():
        for layout, group in product(("dense", "bitmap", "two_of_four"), groups):
            if layout == "two_of_four" and group == 32:
                continue
            for shape in SHAPES:
                for tokens in (TOKENS[turn % 6], TOKENS[(turn + 3) % 6]):
                    yield case(random, values, layout, group, shape, tokens)
                turn += 1


def case(
    random: np.random.Generator,
    values: Values,
    layout: Layout,
    group: int,
    shape: tuple[int, int],
    tokens: int,
) -> Case:
    kept = random.random(shape) < random.choice([0.0, 0.1, 0.5, 1.0])
    if layout == "two_of_four":
        fours = random.random((shape[0], -(-shape[1] // 4), 4)).argsort(axis=2) < 2
        kept &= fours.reshape(shape[0], -1)[:, : shape[1]]
    x = random.standard_normal((tokens, shape[1])).astype(np.float32)
    if values == "bf16":
        bits = (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16) * kept
        weights = bits.astype(np.uint32) << 16
        return Case(
            pack_floats(bits.astype(np.uint16), layout),
            weights.view(np.float32).astype(np.float64),
            x,
        )
    codes = random.integers(-_BIAS[values], _BIAS[values], shape) * kept
    scales = random.random((shape[0], -(-shape[1] // group))).astype(np.float32)
    each = scales.astype(np.float64).repeat(group, axis=1)[:, : shape[1]]
    return Case(pack_codes(codes, scales, group, values, layout), codes * each, x)


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """Activations as the kernel multiplies with: int8 in groups of inputs, float64."""
    tokens, columns = x.shape
    groups = np.pad(x, ((0, 0), (0, -columns % group))).reshape(tokens, -1, group)
    scale = abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    inverse = np.where(scale > 0, 1 / np.maximum(scale, np.float32(1e-37)), 0).astype(np.float32)
    codes = np.rint(groups * inverse).astype(np.float64)
    whole: np.ndarray = (codes * scale).reshape(tokens, -1)[:, :columns]
    return whole
