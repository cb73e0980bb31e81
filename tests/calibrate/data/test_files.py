"""What may stand where a recipe's data are looked for: each is taken, passed over or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prune_export.calibrate.data.files import inside, local_files
from prune_export.errors import PlanError
from prune_export.recipe import LocalText


def names(root: Path, pattern: str) -> list[str]:
    return [str(path.relative_to(root)) for path in inside(root, pattern, "data")]


def refusal(root: Path, pattern: str) -> str:
    with pytest.raises(PlanError) as refused:
        inside(root, pattern, "data")
    return str(refused.value)


def test_a_name_with_brackets_is_that_file(tmp_path: Path) -> None:
    for name in ("t [v1].txt", "t v.txt", "a*.txt", "ab.txt"):
        (tmp_path / name).write_text("text")
    assert names(tmp_path, "t [v1].txt") == ["t [v1].txt"]
    assert names(tmp_path, "t [v]*.txt") == ["t v.txt"]
    assert names(tmp_path, "a*.txt") == ["a*.txt"]
    assert names(tmp_path, "?b.txt") == ["ab.txt"]


def test_directories_that_a_glob_matches_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "text" / "more.txt").mkdir(parents=True)
    assert "`text/*` matches only directories" in refusal(tmp_path, "text/*")
    (tmp_path / "text" / "a.txt").write_text("text")
    assert names(tmp_path, "text/*") == ["text/a.txt"]
    said = refusal(tmp_path, "text/more.txt")
    assert "`text/more.txt` is a directory, expected files" in said
    assert said.endswith("name what is in it, for example `text/more.txt/*.jsonl`")


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for pattern in ("*.txt", "loop.txt"):
        assert "loop.txt is a link that leads in a circle" in refusal(tmp_path, pattern)
    (tmp_path / "loop.txt").unlink()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    for pattern in ("*.txt", "gone.txt"):
        assert "gone.txt is a link to nothing" in refusal(tmp_path, pattern)


def test_a_loop_of_directories_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text("text")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    assert names(tmp_path, "**/*.txt") == ["a/b.txt"]


def test_special_files_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for pattern in ("pipe.txt", "*.txt"):
        assert "pipe.txt is a pipe (FIFO), expected a file of text" in refusal(tmp_path, pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x" * 256 + ".txt", "has a name of 260 bytes, and file systems take 255"),
        ("ä" * 128, "has a name of 256 bytes"),
        ("a\0.txt", "holds a NUL character"),
        ("a/" * 3000 + "b.txt", "names no file"),
        ("a**.txt", "names no file"),
        ("[", "names no file"),
        ("\udcff.txt", "names no file"),
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, pattern: str, message: str) -> None:
    said = refusal(tmp_path, pattern)
    assert message in said or "cannot be looked for" in said
    assert len(said) < 1000


def test_what_cannot_be_read_here_is_told_with_advice(tmp_path: Path) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"")
    (tmp_path / "a.csv").write_bytes(b"")
    (tmp_path / "a.parquet").write_bytes(b"")
    for name, advice in (("a.txt.zst", "compress it with gzip"), ("a.csv", "JSON lines")):
        with pytest.raises(PlanError, match=f"{name}\n  has another format.*\n.*{advice}"):
            local_files(LocalText(files=(name,)), tmp_path)
    with pytest.raises(
        PlanError, match="is Parquet, whose text is UTF-8, but `encoding` is utf-16"
    ):
        local_files(LocalText(files=("a.parquet",), encoding="utf-16"), tmp_path)
