"""Temporary directories: gone with their owner, swept when it was killed, never while it lives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import prune_export
from prune_export.system.temporary import Temporary, sweep

_OWNER = """
import sys, time
from prune_export.system.temporary import Temporary
kept = Temporary()
(kept.path / "large").write_text("states")
print(kept.path, flush=True)
time.sleep(600 if sys.argv[1] == "stays" else 0)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    command = [sys.executable, "-c", _OWNER, "stays"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()


def test_is_gone_when_it_is_closed_or_forgotten(tmp_path: Path) -> None:
    with Temporary() as folder:
        (folder / "file").write_text("")
        assert folder.parent == tmp_path
        assert not sweep(), "our own"
        assert (folder / "file").exists()
    kept = Temporary()
    del kept
    subprocess.run([sys.executable, "-c", _OWNER, "ends"], check=True, capture_output=True)
    assert not list(tmp_path.iterdir())


def test_is_swept_when_its_owner_was_killed(
    owner: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, folder = owner
    assert not sweep()
    assert (folder / "large").exists()
    process.kill()
    process.wait()
    assert (folder / "large").exists()
    assert sweep() == [folder]
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_is_left(tmp_path: Path) -> None:
    (tmp_path / "prune-export-of-before").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / "prune-export-a").symlink_to(tmp_path / "kept")
    (tmp_path / "prune-export-a.lock").write_text("")
    (tmp_path / "prune-export-b.lock").symlink_to(tmp_path / "kept" / "file")
    os.mkfifo(tmp_path / "prune-export-c.lock")
    assert not sweep()
    assert (tmp_path / "kept" / "file").exists()
    assert (tmp_path / "prune-export-of-before").exists()


def test_a_forked_child_takes_nothing_away(tmp_path: Path) -> None:
    kept = Temporary()
    child = os.fork()
    if child == 0:
        kept.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert kept.path.is_dir()
    assert not sweep()
    kept.close()
    assert not list(tmp_path.iterdir())


def test_the_package_makes_no_other_temporary_directory() -> None:
    """Those of a process that we start lie in one of ours: its TMPDIR."""
    makes = re.compile(r"mkdtemp|TemporaryDirectory|NamedTemporaryFile|mkstemp|gettempdir")
    found = {
        file.name
        for file in Path(prune_export.__file__).parent.rglob("*.py")
        if makes.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"temporary.py", "reload_child.py"}
