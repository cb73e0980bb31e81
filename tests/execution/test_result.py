"""How a result gets into its place: killed at any moment, the next run mends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from prune_export.errors import PlanError, StageError
from prune_export.execution.result import Result, alone, mend
from prune_export.system.places import judged
from prune_export.system.written import HELD, LOCK, SUMS, WORK

OLD = {"config.json": "old", "model.safetensors": "old", "gone.txt": "old", "onnx/a.onnx": "old"}
NEW = {"config.json": "new", "model.safetensors": "new", "genai/b.onnx": "new", "onnx/c": "new"}
LISTS = {LOCK, SUMS}


def put(out: Path, files: dict[str, str]) -> None:
    """What a run does at its end."""
    with alone(out):
        result = Result(out)
        for name, text in files.items():
            (result.partial / name).parent.mkdir(exist_ok=True)
            result.write_text(name, text)
        (result.partial / "figures").mkdir()
        result.write_lists({"lock": 1})
        result.finish()


def held(out: Path) -> dict[str, str]:
    """Every entry of a directory, files with their text."""
    return {
        str(path.relative_to(out)): path.read_text() if path.is_file() else "/"
        for path in sorted(out.rglob("*"))
        if not path.is_dir() or not any(path.iterdir())
    }


def is_whole(out: Path, files: dict[str, str]) -> bool:
    found = held(out)
    return found == files | {name: found.get(name, "") for name in LISTS}


def at_each_step(before: Callable[[Path], None], tmp_path: Path) -> Iterator[Path]:
    """Kills a process that puts NEW into a place, at each change that it makes to the disk."""
    for step in range(1, 500):
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        before(out)
        child = os.fork()
        if child == 0:
            left = step

            def count(event: str, arguments: tuple[object, ...]) -> None:
                nonlocal left
                changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
                if changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    left -= 1
                    if not left:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            put(out, NEW)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        yield out
        if os.WIFEXITED(status):
            assert step > 20
            return
    raise AssertionError("it never ended")


@pytest.mark.slow
def test_a_killed_swap_is_mended_by_whoever_comes_next(tmp_path: Path) -> None:
    for out in at_each_step(lambda out: put(out, OLD), tmp_path):
        # A half-filled directory is no model: config.json goes first and comes last.
        if (out / "config.json").exists() and (out / "model.safetensors").exists():
            same = (out / "config.json").read_text() == (out / "model.safetensors").read_text()
            assert same
        judged(out, {})
        mend(out)
        assert is_whole(out, OLD) or is_whole(out, NEW), held(out)
        put(out, NEW)
        assert is_whole(out, NEW)
        assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_killed_first_result_leaves_nothing_that_stays(tmp_path: Path) -> None:
    for out in at_each_step(lambda _: None, tmp_path):
        assert not out.exists() or is_whole(out, NEW)
        judged(out, {})
        put(out, NEW)
        assert is_whole(out, NEW)
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_lists_name_every_file(tmp_path: Path) -> None:
    put(tmp_path / "out", NEW)
    lock = json.loads((tmp_path / "out" / LOCK).read_text())
    assert lock["files"] == sorted([*NEW, LOCK, SUMS])
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path / "out",
                             capture_output=True, check=True, text=True)  # fmt: skip
    assert checked.stdout.count(": OK") == len(NEW) + 1


def test_an_existing_directory_stays_what_it_is(tmp_path: Path) -> None:
    """Also where a link leads to it, and where it is somebody's current directory."""
    real = tmp_path / "real"
    real.mkdir(mode=0o750)
    before = real.stat()
    put(real, OLD)
    put(real, NEW)
    assert is_whole(real, NEW)
    assert (real.stat().st_ino, real.stat().st_mode) == (before.st_ino, before.st_mode)


def test_what_came_meanwhile_is_kept_and_told_of(tmp_path: Path) -> None:
    """Hours lie between a plan and the end of its run."""
    out = tmp_path / "out"
    put(out, OLD)
    for name in ("notes.txt", "genai", "README.md"):
        with alone(out):
            result = Result(out)
            result.write_text("config.json", "new")
            result.write_lists({"lock": 1})
            (out / name).write_text("mine")
            with pytest.raises(StageError, match=name) as caught:
                result.finish()
        assert str(out / WORK / "new") in caught.value.fix
        assert (out / WORK / "new" / "config.json").read_text() == "new"
        assert (out / "config.json").read_text() == "old"
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    put(out, NEW)
    assert is_whole(out, NEW)


@pytest.mark.slow
def test_a_swap_writes_over_nothing(tmp_path: Path) -> None:
    """Killed in the middle, and then the user puts something where the rest would go."""
    for out in at_each_step(lambda out: put(out, OLD), tmp_path):
        work = out / WORK
        if not (work / "swap.json").exists() or not (work / "new" / "genai").exists():
            continue
        (out / "genai").write_text("mine")
        with pytest.raises(StageError, match="genai stands in the way"):
            mend(out)
        assert (out / "genai").read_text() == "mine"
        (out / "genai").unlink()
        mend(out)
        assert is_whole(out, NEW)


def test_a_journal_leaves_its_directory_alone(tmp_path: Path) -> None:
    """A result from a stranger may bring a journal of its own."""
    (tmp_path / "secret").write_text("secret")
    out, work = tmp_path / "out", tmp_path / "out" / WORK
    work.mkdir(parents=True)
    (work / "README.txt").write_text("")
    (work / "old").mkdir()
    (work / "old" / "way").symlink_to(tmp_path)
    for names in ({"old": ["../../../secret"], "new": []}, {"old": ["way/secret"], "new": []}):
        (work / "swap.json").write_text(json.dumps(names))
        with suppress(StageError):
            mend(out)
        assert (tmp_path / "secret").read_text() == "secret"


def test_what_an_earlier_version_left_half_way_is_put_back(tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)
    (tmp_path / "out").rename(tmp_path / ".out.old")
    assert judged(tmp_path / "out", {})
    mend(tmp_path / "out")
    assert is_whole(tmp_path / "out", OLD)


def test_another_ones_directory_of_that_name_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").write_text("mine")
    (tmp_path / ".other.lock").write_text("mine")
    for name in ("out", "other"):
        with pytest.raises(PlanError, match="something else stands there"):
            judged(tmp_path / name, {})
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / "mine").write_text("mine")
    with pytest.raises(PlanError, match="not written by this tool"):
        judged(tmp_path / "out", {})
    mend(tmp_path / "out")
    assert (tmp_path / "out" / WORK / "mine").exists()
    assert (tmp_path / ".out.partial" / "mine").exists()


_MOUNTED = """
import subprocess, sys
from contextlib import suppress
from pathlib import Path
sys.path.insert(0, sys.argv[2])
out = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(out)], check=True)
(out / "lost+found").mkdir()
from test_result import NEW, OLD, is_whole, judged, put
judged(out, {})
put(out, OLD)
(out / "lost+found").rmdir()
assert is_whole(out, OLD)
put(out, NEW)
assert is_whole(out, NEW) and out.is_mount()
"""


@pytest.mark.slow
def test_a_mount_point_is_filled_from_within(tmp_path: Path) -> None:
    """As a container's volume is; its parent may not even be writable."""
    try:
        subprocess.run(["unshare", "--mount", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs root and unshare")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", _MOUNTED, str(tmp_path / "out"),
         str(Path(__file__).parent)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_a_lock_file_left_behind_holds_nobody_up(tmp_path: Path) -> None:
    put(tmp_path / "out", OLD)
    (tmp_path / "out" / HELD).touch()
    (tmp_path / ".out.lock").touch()
    judged(tmp_path / "out", {})
    put(tmp_path / "out", NEW)
    assert is_whole(tmp_path / "out", NEW)
