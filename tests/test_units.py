"""Bytes, counts and seconds, as people read and write them."""

from __future__ import annotations

import pytest

from prune_export import units


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 << 30),
        ("1.5 GB", 1_500_000_000),
        ("800M", 800_000_000),
        ("7", 7),
        ("2kib", 2048),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert units.bytes_from_text(text) == count


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "1 GX", "1..2G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        units.bytes_from_text(text)


def test_values_are_written_for_people() -> None:
    assert units.text_from_bytes(1_610_612_736) == "1.50 GiB"
    assert units.text_from_bytes(12) == "12 B"
    assert units.text_from_count(134_515_008) == "134.5M"
    assert units.text_from_count(9) == "9"
    seconds = [0.23, 14, 200, 7500, 9 * 86400]
    shown = ["0.2 s", "14 s", "3 min 20 s", "2 h 05 min", "9 days"]
    assert [units.text_from_seconds(value) for value in seconds] == shown


def test_a_files_name_is_text_whatever_its_bytes() -> None:
    assert units.text_from_name("régime") == "régime"
    assert units.text_from_name(b"r\xc3\xa9gime".decode("ascii", "surrogateescape")) == "régime"
    assert units.text_from_name(b"r\xe9gime".decode("utf-8", "surrogateescape")) == "r\\xe9gime"
