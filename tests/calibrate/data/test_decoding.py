"""Files that are no text, or not in the encoding that is said: none is read as best it may be."""

from __future__ import annotations

import codecs
import gzip
import json
import random
import zlib
from pathlib import Path

import pytest

from prune_export.calibrate import changed_since_first, token_set
from prune_export.calibrate.data.decoding import lines, whole
from prune_export.calibrate.data.documents import texts_of
from prune_export.errors import PlanError, RecipeError
from prune_export.recipe import LocalText, Recipe

TEXT = "Zażółć gęślą jaźń.\nLe cœur déçu mais l'âme plutôt naïve. 😀\n"


def read(path: Path, column: str = "text", encoding: str | None = None) -> list[object]:
    return list(texts_of([path], LocalText(files=("x",), column=column, encoding=encoding)))


def refusal(path: Path, column: str = "text", encoding: str | None = None) -> str:
    with pytest.raises(PlanError) as refused:
        read(path, column, encoding)
    return str(refused.value)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_mark_of_utf_8_is_no_part_of_the_text(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    content = codecs.BOM_UTF8 + TEXT.encode()
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read(file) == [TEXT]
    assert changed_since_first(LocalText(files=(file.name,)), tmp_path, tmp_path)


def test_a_mark_in_json_lines(tmp_path: Path) -> None:
    """It was never part of their text, so their artifacts keep their names."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + json.dumps({"text": TEXT}).encode() + b"\n")
    assert read(file) == [TEXT]
    assert not changed_since_first(LocalText(files=(file.name,)), tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_and_utf_32_are_refused_and_read_where_said(tmp_path: Path, name: str) -> None:
    family = name[:6]
    mark = "\ufeff".encode(name)
    for suffix, content in ((".txt", TEXT), (".jsonl", json.dumps({"text": TEXT}) + "\n")):
        file = tmp_path / f"a{suffix}"
        file.write_bytes(mark + content.encode(name))
        said = refusal(file)
        assert f"begins with the mark (BOM) of {family.upper()}, expected UTF-8" in said
        assert f"write `encoding: {family}`" in said
        assert read(file, encoding=family) == [TEXT]
        assert read(file, encoding=name) == [TEXT]
        file.write_bytes(("plain ascii " + content if suffix == ".txt" else content).encode(name))
        assert "holds a NUL character, expected text in UTF-8" in refusal(file)
        assert read(file, encoding=name)


def test_a_mark_that_contradicts_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert refusal(file, encoding="cp1252").endswith("leave `encoding` out: the file is UTF-8")


def test_what_is_not_utf_8_is_named_by_byte_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    content = "One line.\nCaf\u00e9.\n".encode("latin-1")
    file.write_bytes(content)
    said = refusal(file)
    assert said.startswith("data files  a.txt:2\n  is not UTF-8: byte 0xe9 at offset 13\n")
    assert "`encoding: cp1252`" in said
    assert read(file, encoding="latin-1") == ["One line.\nCafé.\n"]
    # Past the first piece that is decoded, and split between two of them.
    for before in (65_534, 65_535, 65_536, 200_000):
        file.write_bytes(b"a" * (before - 1) + b"\n" + "😀".encode()[:3] + b"b")
        assert f"a.txt:2\n  is not UTF-8: byte 0xf0 at offset {before}\n" in refusal(file)
        file.write_bytes(b"a" * before + "😀".encode() + b"b")
        assert read(file) == ["a" * before + "😀b"]
    file.write_bytes(b"abc\xc3")
    assert "byte 0xc3 at offset 3" in refusal(file)
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_bytes(b'{"text": "w1"}\n{"text": "\xe9"}\n')
    assert "a.jsonl:2\n  is not UTF-8: byte 0xe9 at offset 25" in refusal(jsonl)
    # An encoded half of a pair is not UTF-8 either.
    jsonl.write_bytes(b'{"text": "\xed\xa0\x80"}\n')
    assert "a.jsonl:1\n  is not UTF-8: byte 0xed" in refusal(jsonl)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for content in (bytes(range(256)), zlib.compress(TEXT.encode()), b"\x7fELF\x02\x01\x01\0\0"):
        file.write_bytes(content)
        assert "is not UTF-8" in refusal(file) or "NUL" in refusal(file)


@pytest.mark.parametrize("name", ["utf-16", "shift_jis", "gb18030", "cp1251", "utf-7"])
def test_lines_are_those_of_the_text_and_not_of_its_bytes(tmp_path: Path, name: str) -> None:
    """In UTF-16 the byte 0x0a is half of many characters; pieces end anywhere."""
    long = ["строка " * 3000, "ਊ" * 40_000 if name in ("utf-16", "gb18030", "utf-7") else "да"]
    file = tmp_path / "a.jsonl"
    content = "\n".join(json.dumps({"text": one}, ensure_ascii=False) for one in long)
    file.write_bytes(content.encode(name))
    assert read(file, encoding=name) == long
    assert [number for number, _ in lines(file, name)] == [1, 2]
    assert whole(file, name) == content


@pytest.mark.parametrize("name", ["bytes", "rot13", "base64", "idna", "undefined", "no\0", "ä", ""])
def test_only_encodings_of_text_are_taken(name: str) -> None:
    text = "recipe: 1\ndata: {a: {files: [a.txt], encoding: %s}}\nexport: [onnx]\n"
    with pytest.raises(RecipeError, match="not an encoding of text that Python knows"):
        Recipe.parse(text % json.dumps(name))
    known = Recipe.parse(text % "utf-16-le")
    assert known.to_dict()["data"]["a"]["encoding"] == "utf-16-le"
    assert "encoding" not in Recipe.parse(text % "null").to_dict()["data"]["a"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_broken_gzip_is_named_by_file_and_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    noise = random.Random(0)
    rows = (json.dumps({"text": f"{noise.getrandbits(999)} {TEXT}"}) + "\n" for _ in range(3000))
    sound = gzip.compress("".join(rows).encode())
    for cut in (len(sound) - 4, len(sound) // 2, 12, 5):
        file.write_bytes(sound[:cut])
        assert "ends before its compressed data do" in refusal(file)
    for at in (0, 3, len(sound) // 2, len(sound) - 6):
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
        said = refusal(file)
        assert said.startswith(f"data files  {name}:")
        assert "gzip" in said or "compressed" in said or "is not" in said
    # What comes before the break can be had, and tells the line.
    file.write_bytes(sound[: len(sound) // 2])
    line = int(refusal(file).partition("gz:")[2].partition("\n")[0])
    assert 100 < line < (6000 if name.endswith("txt.gz") else 3000)
    file.write_bytes(sound + b"more")
    assert "is not sound gzip" in refusal(file)
    file.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(PlanError):
        token_set(LocalText(files=(name,), packing="packed", length=8), tmp_path, tmp_path)


@pytest.mark.parametrize("half", ["\\ud800", "x\\udfff", "\\udc00\\ud800"])
def test_half_a_surrogate_pair_is_no_text(tmp_path: Path, half: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w1"}\n{"text": "HALF"}\n'.replace("HALF", half))
    assert "a.jsonl:2\n  holds \\ud" in refusal(file)
    # Nor is it a name that an error could print.
    for row in ('{"HALF": "w1"}', '{"text": 1, "HALF": "w1"}'):
        file.write_text(row.replace("HALF", half))
        assert refusal(file).encode()
    file.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read(file) == ["😀"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "`text` is null, expected text\n  remove it"),
        (3, "`text` is a number, expected text\n  name the column that holds the text: `body`"),
        (True, "`text` is true or false, expected text"),
        ({"a": 1}, "`text` is an object, expected text"),
        (["a"], "`text` is a list, expected text\n  name the column that holds the text; conv"),
    ],
)
def test_a_column_without_text_is_named_by_line_and_kind(
    tmp_path: Path, value: object, message: str
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "a.jsonl"
    rows = [{"text": "w1", "body": "w2"}, {"text": value, "body": "w2"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert f"data files  a.jsonl:2\n  {message}" in refusal(file)
    other = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": pa.array([value, value])}), other)
    assert f"data files  a.parquet  row 1\n  {message.partition(': `')[0]}" in refusal(other)


def test_broken_parquet_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    raw = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    parquet.write_table(pa.table({"text": raw}), file)
    assert "a.parquet  row 1\n  is not UTF-8: byte 0xff" in refusal(file)
    parquet.write_table(pa.table({"text": [TEXT * 50] * 500}), file, compression="gzip")
    sound = file.read_bytes()
    for at in (8, len(sound) // 3, len(sound) - 40):
        file.write_bytes(sound[:at] + bytes(20) + sound[at + 20 :])
        try:
            read(file)
        except PlanError as error:
            assert str(error).startswith("data files  a.parquet")
    for cut in (0, 3, len(sound) // 2, len(sound) - 1):
        file.write_bytes(sound[:cut])
        assert "is not Parquet" in refusal(file)
