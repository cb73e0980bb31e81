"""Products of packed weights against float64, with each instruction set, and under sanitizers."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prune_export.errors import CheckpointError, PlanError
from prune_export.kernels import Library, pack_codes, pack_floats, refuse_without_compiler
from prune_export.kernels import compiling as compiling_module
from prune_export.kernels.compiling import compile_library, compiler
from prune_export.kernels.packing import Packed
from tests.kernels.cases import INSTRUCTIONS, cases

TOLERANCE = 5e-7  # of the sum of magnitudes: float32 sums


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest, kernel: Library) -> Iterator[Library]:
    """The kernel with one instruction set; skipped where this processor does not have it."""
    if kernel.use(request.param) != request.param:
        kernel.use("avx512")
        pytest.skip(f"this processor has no {request.param}")
    yield kernel
    kernel.use("avx512")


def test_every_kind_of_matrix_is_multiplied_right(instructions: Library) -> None:
    for case in cases():
        expected, size = case.expected()
        found = instructions.multiply(case.packed, case.x)
        assert abs(found - expected).max(initial=0) <= TOLERANCE * size, case.name


def test_codes_at_both_ends_do_not_saturate(instructions: Library) -> None:
    """-128 times -127, everywhere: sums of two products are the most that 16 bits hold."""
    for values, least in (("int8", -128), ("int4", -8)):
        codes = np.full((2, 256), least)
        packed = pack_codes(codes, np.ones((2, 2), np.float32), 128, values)  # type: ignore[arg-type]
        for sign in (1, -1):
            found = instructions.multiply(packed, np.full((1, 256), sign * 127, np.float32))
            assert (found == least * sign * 127 * 256).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_show(instructions: Library, bad: float) -> None:
    """A token that has one becomes NaN or infinite; the other tokens do not."""
    x = np.ones((3, 200), np.float32)
    x[1, 150] = bad
    for packed in (
        pack_codes(np.ones((4, 200), int), np.ones((4, 2), np.float32), 128, "int8"),
        pack_floats(np.full((4, 200), 0x3F80, np.uint16)),
    ):
        found = instructions.multiply(packed, x)
        assert not np.isfinite(found[1]).any()
        assert (found[[0, 2]] == 200).all()


def test_rows_without_a_weight_and_no_rows_at_all(instructions: Library) -> None:
    empty = pack_codes(np.zeros((5, 100), int), np.ones((5, 1), np.float32), 128, "int4")
    assert empty.layout == "two_of_four"
    bitmap = pack_codes(np.zeros((5, 100), int), np.ones((5, 1), np.float32), 128, "int4", "bitmap")
    none = pack_codes(np.zeros((0, 100), int), np.ones((0, 1), np.float32), 128, "int4", "bitmap")
    x = np.ones((2, 100), np.float32)
    assert not instructions.multiply(empty, x).any()
    assert not instructions.multiply(bitmap, x).any()
    assert instructions.multiply(none, x).shape == (2, 0)
    assert instructions.multiply(bitmap, x[:0]).shape == (0, 5)


def test_tiny_and_huge_activations_keep_their_scale(instructions: Library) -> None:
    packed = pack_codes(np.ones((1, 64), int), np.ones((1, 1), np.float32), 64, "int8")
    for size in (1e-30, 1e30, 0.0):
        found = instructions.multiply(packed, np.full((1, 64), size, np.float32))
        np.testing.assert_allclose(found, 64 * np.float32(size), rtol=1e-5)


def test_more_tokens_than_there_is_room_for_are_refused(kernel: Library) -> None:
    packed = pack_codes(np.ones((1, 64), int), np.ones((1, 1), np.float32), 64, "int8")
    held = kernel.hold(packed, tokens=2)
    assert (held.multiply(np.ones((2, 64), np.float32)) == 64).all()
    for shape in ((3, 64), (1, 63)):
        with pytest.raises(ValueError, match="expected up to 2 tokens of 64 inputs"):
            held.multiply(np.ones(shape, np.float32))


def test_memory_is_read_whole(kernel: Library) -> None:
    words = np.arange(1024, dtype=np.uint64)
    assert kernel.read(words.view(np.uint8)) == words.sum()


def test_a_damaged_matrix_is_refused_by_the_kernel(kernel: Library) -> None:
    codes = np.random.default_rng(0).integers(-9, 9, (4, 300))
    packed = pack_codes(codes, np.ones((4, 3), np.float32), 128, "int8")
    x = np.ones((1, 300), np.float32)
    for change, reason in (
        (lambda data: data[:-1], "cut off"),
        (lambda data: data[:20], "does not start with"),
        (lambda data: np.bitwise_xor(data, np.arange(data.size) == 200), "checksum"),
    ):
        broken = Packed(4, 300, "int8", packed.layout, 128, change(packed.data).astype(np.uint8))
        with pytest.raises(CheckpointError, match=reason):
            kernel.multiply(broken, x)


@pytest.mark.slow
def test_the_same_compiler_makes_the_same_bytes(kernel_file: Path, tmp_path: Path) -> None:
    compiling_module._compiled.cache_clear()
    compile_library(tmp_path / "again.so")
    assert (tmp_path / "again.so").read_bytes() == kernel_file.read_bytes()


def test_without_a_compiler_the_plan_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PlanError, match="apt install g"):
        refuse_without_compiler("export.onnx.packed")


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """AddressSanitizer and UBSan, with all cases and with thousands of damaged matrices."""
    if (found := compiler()) is None:
        pytest.skip("there is no C++ compiler on the PATH")
    source = Path(compiling_module.__file__).parent
    fuzz = tmp_path / "fuzz"
    flags = ["-std=c++17", "-O1", "-g1", "-w", "-fsanitize=address,undefined"]
    built = subprocess.run(
        [found, *flags, "-fno-sanitize-recover=all", f"-I{source}",
         str(Path(__file__).with_name("fuzz.cpp")), str(source / "packed.cpp"),
         str(source / "packed_format.cpp"), "-o", str(fuzz)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "sanit" in built.stderr and built.returncode:
        pytest.skip(f"{found} has no sanitizers here: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    made = list(cases(seed=1))
    with (tmp_path / "cases").open("wb") as stream:
        for case in made:
            size = case.packed.data.size
            stream.write(struct.pack("<IIQ", len(case.x), case.packed.columns, size))
            stream.write(case.x.tobytes() + case.packed.data.tobytes())
    for wanted in INSTRUCTIONS:
        answers = tmp_path / wanted
        done = subprocess.run(
            [str(fuzz), str(tmp_path / "cases"), str(answers), wanted],
            capture_output=True, text=True, check=False,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        used, right, taken, refused = done.stdout.split()
        assert int(right) == len(made)
        assert int(taken) > 500  # damage that keeps the format is multiplied with
        assert int(refused) > 2000
        if used == wanted:
            found_all = np.fromfile(answers, np.float32)
            for case in made:
                expected, size = case.expected()
                mine, found_all = np.split(found_all, [expected.size])
                error = abs(mine.reshape(expected.shape) - expected).max(initial=0)
                assert error <= TOLERANCE * size, f"{wanted} {case.name}"
