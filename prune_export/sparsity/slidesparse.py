"""SlideSparse: rewrites a (2N-2):2N weight exactly as a longer 2:4 weight.

Sparse tensor cores know 2 of 4 only. A group of 2N inputs is covered by N-1 windows of four that
overlap by two; each non-zero goes to the first window that covers it and has room for it. The
windows, side by side, are 2 of 4, and the input is gathered in the same order for all outputs:

    group      a b c d e f g h          N = 4, at most 6 of 8
    windows    a b c d | c d e f | e f g h

What a window does not take is zero in it, so every weight is used once and the product is the same
number, summed in another order. It works for every weight of such a pattern, and for no other.
The expanded weight is 4(N-1)/2N as long, so of/keep is the most that it can gain over dense: 1.33
for 6 of 8. As 4 of 8 needs the same windows, it is no faster than 6 of 8.

Source: "SlideSparse: Fast and Flexible (2N-2):2N Structured Sparsity", arXiv:2603.05232, section 3.
Differs: indices past the last input point to it, with zero weights, so that the input need not be
padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

import numpy as np

from prune_export.sparsity.nm import Nm

WINDOW: Final = 4
ROOM: Final = 2
"""Non-zeros that a window of four takes: what the hardware knows."""

PATTERNS: Final = tuple(Nm(of - 2, of) for of in (6, 8, 10, 12, 14, 16))
"""What is rewritten, fastest first; the first that a weight holds is taken."""

INPUTS_MULTIPLE: Final = 32
OUTPUTS_MULTIPLE: Final = 16
"""Sizes of the expanded weight that sparse kernels of all types can take."""

_CACHED: Final = 1 << 18
"""Elements of one lane that are worked on at once: they stay in the processor's cache."""


def bound(pattern: Nm) -> float:
    """The largest speedup of sparse tensor cores over dense ones for a pattern."""
    return pattern.of / pattern.keep


def windows_for(nm: Nm) -> Nm | None:
    """The (2N-2):2N pattern to rewrite an `nm` weight as; None where there is none."""
    for pattern in PATTERNS:
        inside = pattern.of % nm.of == 0 and nm.keep * (pattern.of // nm.of) <= pattern.keep
        if inside:
            return pattern
    return None


def expanded_inputs(inputs: int, pattern: Nm) -> int:
    """The number of inputs K' of the expanded weight."""
    groups = -(-inputs // pattern.of)
    wide = groups * _expanded_group(pattern)
    return wide + -wide % INPUTS_MULTIPLE


def gather_index(inputs: int, pattern: Nm) -> np.ndarray:
    """Makes the Gather index int64 `[K']`: the original input of each expanded one."""
    group = _group_index(pattern)
    groups = -(-inputs // pattern.of)
    index = (np.arange(groups)[:, None] * pattern.of + group).ravel()
    padded = np.pad(index, (0, expanded_inputs(inputs, pattern) - len(index)), mode="edge")
    clamped: np.ndarray = np.minimum(padded, inputs - 1)
    return clamped


def pattern_of(nonzero: np.ndarray) -> Nm | None:
    """Finds the first of `PATTERNS` that `nonzero` bool `[K, out]` has, or None."""
    return next((pattern for pattern in PATTERNS if holds(nonzero, pattern)), None)


def holds(nonzero: np.ndarray, nm: Nm) -> bool:
    """Whether at most `nm.keep` of every `nm.of` inputs of `nonzero` bool `[K, out]` are set."""
    return fullest(nonzero, nm.of, nm.keep) <= nm.keep


def fullest(nonzero: np.ndarray, of: int, enough: int | None = None) -> int:
    """The most that is set in a group of `of` inputs of `nonzero` bool `[K, out]`.

    The count ends at the first piece that has more than `enough`, by default a full group.
    """
    most = 0
    for _, rows, columns in _pieces(nonzero, of):
        groups = _grouped(nonzero[rows, columns], of)
        counts = np.zeros_like(groups[:, 0], np.uint8)
        for lane in range(of):
            counts += groups[:, lane]
        most = max(most, int(counts.max(initial=0)))
        if most > (of - 1 if enough is None else enough):
            break
    return most


def expanded(weight: np.ndarray, pattern: Nm, nonzero: np.ndarray | None = None) -> np.ndarray:
    """Expands `weight` `[K, out]` to `[K', out]`: `weight.T @ x == expanded.T @ x[gather_index]`.

    `nonzero` bool `[K, out]` says which weights are not zero, where comparing the values themselves
    does not.

    Raises:
        ValueError: the weight does not hold the pattern.
    """
    inputs, outputs = weight.shape
    nonzero = np.not_equal(weight, 0) if nonzero is None else nonzero
    order: Literal["C", "F"] = "F" if _is_turned(weight) else "C"
    wide = np.zeros((expanded_inputs(inputs, pattern), outputs), weight.dtype, order)
    size = _expanded_group(pattern)
    for first, rows, columns in _pieces(weight, pattern.of):
        values = _grouped(weight[rows, columns], pattern.of)
        used = _grouped(nonzero[rows, columns], pattern.of)
        here = wide[first * size : (first + len(values)) * size, columns]
        _fill(_grouped(here, size), values, used)
    return wide


def _fill(wide: np.ndarray, values: np.ndarray, used: np.ndarray) -> None:
    """Distributes `values` `[groups, 2N, out]` over the windows `wide` `[groups, 4(N-1), out]`.

    Windows and lanes ascend and each takes what it can: a window leaves nothing in its first two
    lanes, as they hold at most what it has room for, so the last one has to hold the rest.
    """
    lanes = values.shape[1]
    left = used.copy(order="K")
    for window in range(lanes // 2 - 1):
        taken = np.zeros_like(left[:, 0], np.uint8)  # in the order of the memory, which is faster
        for lane in range(WINDOW):
            source = 2 * window + lane
            takes = left[:, source] & (taken < ROOM)
            np.copyto(wide[:, WINDOW * window + lane], values[:, source], where=takes)
            taken += takes
            left[:, source] &= ~takes
    if left.any():
        raise ValueError(f"more than {lanes - 2} of {lanes} neighbouring inputs are not zero")


def _pieces(matrix: np.ndarray, of: int) -> Iterator[tuple[int, slice, slice]]:
    """Cuts `[K, out]` into what stays in the cache: (its first group, inputs, outputs)."""
    inputs, outputs = matrix.shape
    if _is_turned(matrix):  # its inputs are neighbours in memory
        step = max(1, _CACHED * 4 // inputs)
        for start in range(0, outputs, step):
            yield 0, slice(None), slice(start, start + step)
        return
    groups = max(1, _CACHED // outputs)
    for start in range(0, inputs, groups * of):
        yield start // of, slice(start, start + groups * of), slice(None)


def _grouped(piece: np.ndarray, of: int) -> np.ndarray:
    """Splits `[K, out]` into `[groups, of, out]`, padding with zeros; a view where possible.

    Splitting an axis needs no copy in either order of memory.
    """
    if short := -len(piece) % of:
        turned = _is_turned(piece)
        piece = np.pad(piece, ((0, short), (0, 0)))
        piece = np.asfortranarray(piece) if turned else piece
    return piece.T.reshape(piece.shape[1], -1, of).transpose(1, 2, 0)


def _is_turned(matrix: np.ndarray) -> bool:
    return abs(matrix.strides[0]) < abs(matrix.strides[1])


def _expanded_group(pattern: Nm) -> int:
    return WINDOW * (pattern.of // 2 - 1)


def _group_index(pattern: Nm) -> np.ndarray:
    """`[4(N-1)]`: the lanes of a group in the order of the windows."""
    windows = np.arange(pattern.of // 2 - 1)
    return (2 * windows[:, None] + np.arange(WINDOW)).ravel()
