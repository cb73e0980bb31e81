from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from prune_export.calibrate.data import packing
from prune_export.calibrate.data.packing import Document


def documents(*lengths: int) -> list[Document]:
    """Document d holds the ids 100 d, 100 d + 1, …, so that each id tells where it is from."""
    return [
        Document(f"d{i}", np.arange(100 * i, 100 * i + n, dtype=np.int32))
        for i, n in enumerate(lengths)
    ]


def test_packed_windows_worked_by_hand() -> None:
    found = packing.packed(
        documents(3, 4, 5), length=5, samples=None, pool=None, seed=0, prefix=[1], separator=[2]
    )
    rows = sorted(found.ids.tolist())
    assert rows == [
        [1, 0, 1, 2, 2],
        [1, 2, 200, 201, 202],
        [1, 100, 101, 102, 103],
    ]
    assert found.available == 3


def test_packed_windows_name_the_documents_that_they_use() -> None:
    by_row = {
        tuple(packing.packed(documents(3, 4, 5), length=4, samples=1, pool=None, seed=seed).ids[0])
        : packing.packed(documents(3, 4, 5), length=4, samples=1, pool=None, seed=seed).documents
        for seed in range(20)
    }  # fmt: skip
    assert by_row == {
        (0, 1, 2, 100): ("d0", "d1"),
        (101, 102, 103, 200): ("d1", "d2"),
        (201, 202, 203, 204): ("d2",),
    }


def test_the_seed_decides_which_windows_and_their_order() -> None:
    def drawn(seed: int) -> list[list[int]]:
        found = packing.packed(documents(*[50] * 8), length=10, samples=5, pool=None, seed=seed)
        return found.ids.tolist()

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert len({tuple(row) for row in drawn(3)}) == 5


def test_packed_reads_no_more_than_the_pool() -> None:
    read = []

    def texts() -> Iterator[Document]:
        for document in documents(*[10] * 100):
            read.append(document.hash)
            yield document

    found = packing.packed(texts(), length=10, samples=2, pool=4, seed=0)
    assert (len(read), found.available) == (4, 4)


def test_windows_are_contiguous_and_of_documents_longer_than_one() -> None:
    lengths = [5, 20, 9, 10, 30]
    found = packing.windows(
        documents(*lengths), length=10, samples=None, pool=None, seed=1, prefix=[7]
    )
    assert found.available == 3
    assert sorted(found.documents) == ["d1", "d3", "d4"]
    for row, name in zip(found.ids, found.documents, strict=True):
        start, number = int(row[1]), int(name[1])
        assert row.tolist() == [7, *range(start, start + 9)]
        assert 100 * number <= start <= 100 * number + lengths[number] - 9


def test_every_start_of_a_window_is_drawn() -> None:
    starts = {
        int(packing.windows(documents(6), length=4, samples=1, pool=1, seed=seed).ids[0, 0])
        for seed in range(60)
    }
    assert starts == {0, 1, 2}


def as_letters(text: str) -> packing.Ids:
    return np.array([ord(letter) for letter in text], np.int32)


def test_a_stream_joins_by_blank_lines_and_keeps_the_order() -> None:
    texts = iter([("a", "abc"), ("b", "de"), ("c", "fghij")])
    found = packing.stream(texts, as_letters, length=4, samples=None)
    joined = "abc\n\nde\n\nfghij"
    assert found.available == 3
    assert ["".join(map(chr, row)) for row in found.ids] == [joined[:4], joined[4:8], joined[8:12]]
    assert found.documents == ("a", "b", "c")


def test_a_limited_stream_is_the_beginning_of_the_whole_and_reads_less() -> None:
    read = []

    def texts() -> Iterator[tuple[str, str]]:
        for i in range(1000):
            read.append(i)
            yield f"d{i}", f"document {i} " * 3

    whole = packing.stream(texts(), as_letters, length=16, samples=None)
    count = len(read)
    read.clear()
    some = packing.stream(texts(), as_letters, length=16, samples=5)
    assert np.array_equal(some.ids, whole.ids[:5])
    assert len(read) < count / 10


@pytest.mark.parametrize("samples", [None, 3])
def test_an_empty_source_gives_no_windows(samples: int | None) -> None:
    nothing: list[Document] = []
    assert packing.packed(nothing, length=4, samples=samples, pool=9, seed=0).ids.shape == (0, 4)
    assert packing.windows(nothing, length=4, samples=samples, pool=9, seed=0).ids.shape == (0, 4)
    assert packing.stream(iter([]), as_letters, length=4, samples=samples).ids.shape == (0, 4)
