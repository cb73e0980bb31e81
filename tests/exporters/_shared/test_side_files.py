"""What belongs to the model lies whole beside each engine, and nothing else of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from prune_export.checkpoint import Checkpoint
from prune_export.exporters._shared.side_files import copy_files, copy_side_files


def test_config_and_side_files_are_copied_byte_for_byte(tiny_llama: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(tiny_llama)
    copy_side_files(opened, tmp_path)
    names = {"config.json", *(file.name for file in opened.side_files())}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert all((tmp_path / n).read_bytes() == (tiny_llama / n).read_bytes() for n in names)


@pytest.mark.parametrize("replacing", [True, False])
def test_what_the_exporter_wrote_stays_where_that_is_asked(
    tiny_llama: Path, tmp_path: Path, *, replacing: bool
) -> None:
    (tmp_path / "config.json").write_text("the exporter's")
    copy_side_files(Checkpoint.open(tiny_llama), tmp_path, replacing=replacing)
    kept = (tmp_path / "config.json").read_text() == "the exporter's"
    assert kept is not replacing


def test_a_copy_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("whole")
    with pytest.raises(FileNotFoundError):
        copy_files([tmp_path / "config.json"], out)
    assert [file.read_text() for file in out.iterdir()] == ["whole"]
