"""What Windows and macOS lack stands in one module; without it, everything imports and plans."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import prune_export
from prune_export.calibrate.streaming.offload import Buffer
from prune_export.system import platforms
from prune_export.system.locking import held_if_free, locked, sweep_lock, write_atomically
from prune_export.system.temporary import Temporary

_MISSING_MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
_MISSING = {
    "os": (
        "O_CLOEXEC", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "copy_file_range", "fork",
        "geteuid", "getuid", "killpg", "mkfifo", "posix_fadvise", "pread", "preadv", "pwrite",
        "pwritev", "sched_getaffinity", "sched_setaffinity", "sendfile", "setsid",
    ),
    "signal": ("SIGCONT", "SIGSTOP"),
}  # fmt: skip
"""What CPython for Windows does not have; for macOS, a part of it."""

_GUARDED = {
    ("checkpoint/writer.py", "copy_file_range"),
    ("checkpoint/writer.py", "sendfile"),
    ("system/platforms.py", "preadv"),
    ("system/platforms.py", "pwrite"),
}
"""Asked for with `hasattr` before they are called."""

_ELSEWHERE = """
import importlib, os, pkgutil, signal, sys

import psutil  # its build for this system stands on modules that only this system has

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            raise ImportError(f"no module named {name!r} on this system", name=name)

for name in MODULES:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Absent())
for module, names in MISSING.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)

import prune_export

names = [found.name for found in pkgutil.walk_packages(prune_export.__path__, "prune_export.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
assert len(names) > 200, names

from prune_export.cli import main

sys.argv = ["prune-export", "plan", *sys.argv[1:]]
main()
"""


@pytest.mark.slow
def test_everything_imports_and_plans_where_posix_is_missing(
    tmp_path: Path, tiny_llama: Path
) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"text": "The river runs past the mill."}\n' * 40)
    (tmp_path / "recipe.yaml").write_text(
        "recipe: 1\n"
        "data: {calibration: {files: [corpus.jsonl], samples: 2, length: 16}}\n"
        "stages:\n- prune: {method: block_influence, remove: 2}\nexport: [{onnx: {}}]\n"
    )
    script = f"MODULES = {_MISSING_MODULES!r}\nMISSING = {_MISSING!r}\n{_ELSEWHERE}"
    asked = ["recipe.yaml", "--model", str(tiny_llama), "--store", "store", "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *asked],
        cwd=tmp_path,
        env=os.environ | {"USERNAME": "somebody"},  # Windows says it there; torch asks
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 blocks" in done.stdout or "6 → 4" in done.stdout, done.stdout


def _uses(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in _MISSING_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in _MISSING_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in _MISSING.get(owner, ()):
                yield node.attr


def test_only_guarded_places_name_what_windows_lacks() -> None:
    package = Path(prune_export.__file__).parent
    found = {
        (file.relative_to(package).as_posix(), name)
        for file in package.rglob("*.py")
        for name in _uses(file)
    }
    assert found == _GUARDED


def test_rows_go_through_a_file_without_positioned_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    rows = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    with Buffer(6, (4,), torch.float32, path=tmp_path / "rows") as buffer:
        buffer.write(3, rows[3:])
        buffer.write(0, rows[:3])
        assert torch.equal(buffer.read(0, 6), rows)
        assert torch.equal(buffer.read(2, 4), rows[2:4])


def test_cores_are_counted_where_nobody_says_which_are_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert platforms.usable_cores() == os.cpu_count()


def test_locks_where_open_files_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: the lock's file stays, free, and no lock is taken twice."""
    monkeypatch.setattr(platforms, "UNLINKS_OPEN_FILES", False)
    monkeypatch.setattr(Path, "unlink", _refused)
    lock = tmp_path / "artifact.lock"
    with locked(lock), held_if_free(lock) as free:
        assert not free
    with held_if_free(lock) as free:
        assert free
    assert not sweep_lock(lock)
    Temporary().close()
    write_atomically(tmp_path / "note", "said")
    assert (tmp_path / "note").read_text() == "said"
    assert sorted(os.listdir(tmp_path)) == ["artifact.lock", "note"]


def _refused(path: Path, missing_ok: bool = False) -> None:
    raise PermissionError(path)
