"""What stands at a path is looked at before it is read: nothing waits, nothing fills memory."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from prune_export.errors import CheckpointError, RecipeError
from prune_export.system.files import (
    DEEPEST,
    is_regular,
    open_regular,
    parse_json,
    read_json_object,
    read_regular,
    read_regular_text,
)  # fmt: skip


def test_reads_a_regular_file_and_one_behind_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"text")
    link.symlink_to(file)
    assert read_regular(file, 4) == read_regular(link, 4) == b"text"
    with open_regular(file) as stream:
        assert stream.read() == b"text"
    assert is_regular(link) and not is_regular(tmp_path) and not is_regular("a\0b")


def test_refuses_a_file_over_its_bound(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"text")
    with pytest.raises(CheckpointError, match="has 4 bytes, expected at most 3 for a card"):
        read_regular(file, 3, "a card")


def test_a_file_without_a_true_length_is_bounded_too() -> None:
    with pytest.raises(CheckpointError, match="expected at most 10 for a file"):
        read_regular("/proc/cpuinfo", 10)


def _special(kind: str, place: Path) -> None:
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "directory":
        place.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(place))
    elif kind == "symbolic links":
        place.symlink_to(place)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "socket", "symbolic links"])
def test_refuses_what_is_no_regular_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _special(kind, Path("x"))
    assert not is_regular("x")
    with pytest.raises(RecipeError, match=rf"(?s)^x\n.*{kind}.*\n.*"):
        open_regular("x", error=RecipeError)


@pytest.mark.parametrize(
    ("path", "message"),
    [("none", "is missing"), ("x" * 300, "File name too long"), ("a\0b", "null byte")],
)
def test_names_what_cannot_be_opened(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_regular(path)


def test_text_that_is_not_utf8_is_told_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(CheckpointError, match=r"is not UTF-8 \(byte 2\)"):
        read_regular_text(tmp_path / "a", 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper"),
        ("[]", "is a JSON list, expected an object"),
        ("{", "is not JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_json_is_checked_at_the_door(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json_object(tmp_path / "a.json")


def test_json_as_deep_as_allowed_and_whole_pairs_pass() -> None:
    deep = '{"a":' * DEEPEST + "1" + "}" * DEEPEST
    assert parse_json(deep, "x") == json.loads(deep)
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}
