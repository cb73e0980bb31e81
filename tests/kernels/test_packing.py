"""The format of packed weights: what is packed is read back, and damage is refused."""

from __future__ import annotations

import numpy as np
import pytest

from prune_export.errors import CheckpointError
from prune_export.kernels import pack_codes, pack_floats, unpack
from prune_export.kernels.packing import Packed, read
from tests.kernels.cases import cases


def test_what_is_packed_is_read_back() -> None:
    for case in cases():
        found = unpack(case.packed.data.tobytes())
        np.testing.assert_array_equal(found, case.weights.astype(np.float32), case.name)


def test_bytes_fall_as_the_format_says() -> None:
    """A bit a weight, what is kept, a scale for each 128, and an offset for each row."""
    kept = np.arange(4096) % 4 < 1  # a quarter, in no two of four by chance
    kept[:3] = True
    codes = np.where(kept, 3, 0)[None].repeat(8, axis=0)
    scales = np.ones((8, 32), np.float32)
    share = kept.mean()
    int8 = pack_codes(codes, scales, 128, "int8")
    assert int8.layout == "bitmap"
    assert int8.bytes_a_weight == pytest.approx(share + 1 / 8 + 4 / 128, abs=2e-3)
    int4 = pack_codes(codes, scales, 128, "int4")
    assert int4.bytes_a_weight == pytest.approx(share / 2 + 1 / 8 + 4 / 128, abs=1e-2)
    bits = np.where(kept, 0x3F80, 0)[None].repeat(8, axis=0).astype(np.uint16)
    assert pack_floats(bits).bytes_a_weight == pytest.approx(2 * share + 1 / 8, abs=2e-3)


def test_the_smallest_layout_is_chosen() -> None:
    dense = np.ones((4, 256), int)
    halves = np.arange(256) % 4 < 2
    scattered = np.arange(256) % 8 < 4
    scales = np.ones((4, 2), np.float32)
    assert pack_codes(dense, scales, 128, "int8").layout == "dense"
    assert pack_codes(dense * halves, scales, 128, "int8").layout == "two_of_four"
    assert pack_codes(dense * scattered, scales, 128, "int8").layout == "bitmap"
    few = np.ones((4, 8), np.float32)
    assert pack_codes(dense * halves, few, 32, "int8").layout == "bitmap"


@pytest.mark.parametrize(
    ("codes", "group", "layout", "reason"),
    [
        (np.full((1, 64), 8), 64, None, "more than int4 holds"),
        (np.ones((1, 64), int), 16, None, "expected 32 or a multiple of 64"),
        (np.ones((1, 64), int), 96, None, "expected 32 or a multiple of 64"),
        (np.ones((1, 128), int), 64, None, "got scales"),
        (np.ones((1, 64), int), 64, "two_of_four", "more than two of four"),
    ],
)
def test_what_does_not_fit_is_refused(
    codes: np.ndarray, group: int, layout: str | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        pack_codes(codes, np.ones((1, 1), np.float32), group, "int4", layout)  # type: ignore[arg-type]


def _packed() -> Packed:
    codes = np.random.default_rng(0).integers(-3, 3, (4, 300))
    return pack_codes(codes, np.ones((4, 3), np.float32), 128, "int8", "bitmap")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0, 1, "do not start with PEPACKED"),
        (8, 9, "version 9"),
        (20, 7, "values 7"),
        (24, 7, "layout 7"),
        (28, 17, "groups of 17"),
        (32, 1, "expected the"),
        (200, 1, "checksum"),
    ],
)
def test_damage_is_refused(at: int, value: int, reason: str) -> None:
    data = _packed().data.copy()
    data[at] ^= value if at == 200 else data[at] ^ value
    with pytest.raises(CheckpointError, match=reason):
        unpack(data)


@pytest.mark.parametrize("length", [0, 10, 63, 64, 200, -1])
def test_a_truncated_matrix_is_refused(length: int) -> None:
    with pytest.raises(CheckpointError):
        read(_packed().data[:length].tobytes())
