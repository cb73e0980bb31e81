"""Stores with broken files, directories that are none, and what killed runs left in one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError
from prune_export.store import Store
from tests.test_store import KEY, write_one

BROKEN: tuple[Any, ...] = (
    {}, [], None, 7, "text", {"files": []}, {"files": {"a": 1}}, {"record": 1}, {"seconds": "1"},
    {"seconds": float("nan")}, {"id": "prune-other-" + "0" * 24}, {"version": 1}, {"inputs": "x"},
    {"files": {"../../secret": {"sha256": "0" * 64, "stamp": [1, 2, 3]}}},
    {"files": {"deep/a.bin": {"sha256": "0" * 63, "stamp": [1, 2, 3]}}},
    {"files": {"deep/a.bin": {"sha256": "0" * 64, "stamp": None}}},
    {"record": {"log": {"dropped": [2]}}}, {"parameters": None},
)  # fmt: skip


@pytest.mark.parametrize("said", BROKEN, ids=str)
def test_a_broken_manifest_is_an_artifact_that_is_not_there(tmp_path: Path, said: Any) -> None:
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    out.mkdir()
    store.make(KEY, write_one)
    store.remember(out, [KEY.id])
    manifest = store.root / KEY.id / "manifest.json"
    whole = json.loads(manifest.read_text())
    changed = {**whole, **said} if isinstance(said, dict) and said else said
    manifest.write_text(json.dumps(changed))
    assert store.get(KEY.id) is None
    assert [entry[3] for entry in store.artifacts()] == [False]
    assert store.garbage() == store.broken() == [KEY.id], "whoever needs it"
    assert not store.made("prune", tmp_path)
    store.make(KEY, write_one)
    assert store.get(KEY.id) is not None
    assert not store.broken()


def test_each_key_of_a_manifest_is_needed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make(KEY, write_one)
    manifest = store.root / KEY.id / "manifest.json"
    whole = json.loads(manifest.read_text())
    for key in whole.keys() - {"sum"}:
        manifest.write_text(json.dumps({name: whole[name] for name in whole if name != key}))
        assert store.get(KEY.id) is None, key
    # As versions wrote it that knew of no sum.
    manifest.write_text(json.dumps({name: whole[name] for name in whole if name != "sum"}))
    assert store.get(KEY.id) is not None


def test_what_is_no_readable_file_is_no_manifest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make(KEY, write_one)
    manifest = store.root / KEY.id / "manifest.json"
    for content in (b"", b"\xff\xfe", b"{", b"[" * 200_000, b'{"a":' * 100_000):
        manifest.write_bytes(content)
        assert store.get(KEY.id) is None
    manifest.unlink()
    os.mkfifo(manifest)  # nobody will ever write to it
    assert store.get(KEY.id) is None
    manifest.unlink()
    manifest.mkdir()
    assert store.get(KEY.id) is None
    with manifest.with_name("huge").open("wb") as file:
        file.truncate(1 << 40)
    manifest.rmdir()
    manifest.with_name("huge").rename(manifest)
    assert store.get(KEY.id) is None
    store.remove(KEY.id)
    assert not list(store.artifacts())


@pytest.mark.parametrize("said", [[], None, {"a": 1}, {"a": {"stamp": [], "sha256": 1}}, "x", "{"])
def test_broken_memory_is_forgotten(tmp_path: Path, said: Any) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    (store.root / "seen.json").write_text(said if said == "{" else json.dumps(said))
    assert store.file_hash(file) == hashlib.sha256(b"one").hexdigest()


BROKEN_NOTES: tuple[Any, ...] = (
    [], None, {}, {"out": 1, "ids": []}, {"out": "/", "ids": [1]}, {"out": "/", "ids": "abc"},
    {"out": "a\0b", "ids": []},
)  # fmt: skip


@pytest.mark.parametrize("said", BROKEN_NOTES)
def test_a_broken_note_about_a_result_goes_with_the_garbage(tmp_path: Path, said: Any) -> None:
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    out.mkdir()
    kept = store.make(KEY, write_one)
    store.remember(out, [kept.id])
    (store.root / "roots" / "broken.json").write_text(json.dumps(said))
    assert not store.garbage()
    told = store.broken()
    assert told == ([] if said == {"out": "a\0b", "ids": []} else ["roots/broken.json"])
    for name in told:
        store.remove(name)
    assert not store.broken()
    assert not store.garbage()


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "thesis").mkdir(parents=True)
    (home / "manifest.json").write_text("{}")
    for make in (True, False):
        with pytest.raises(PlanError, match=r"is no store[\s\S]*manifest.json and thesis"):
            Store(home, make=make)
    assert sorted(path.name for path in home.iterdir()) == ["manifest.json", "thesis"]
    for absent in ("nothing", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(PlanError, match="no run has used it"):
            Store(tmp_path / absent, make=False)
    assert not (tmp_path / "nothing").exists()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match="is a pipe"):
        Store(tmp_path / "pipe")


def test_a_store_is_marked_and_one_of_before_is_recognised(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.make(KEY, write_one)
    store.remember(tmp_path, [])
    mark = store.root / ".prune-export-store"
    assert json.loads(mark.read_text()) == {"store": 1}
    mark.unlink()
    (store.root / "seen.json").write_text("{}")
    (store.root / ".seen.json.123").write_text("{}")
    (store.root / f"{KEY.id}.lock").touch()
    (store.root / f"{KEY.id}.partial").mkdir()
    assert Store(store.root, make=False).get(KEY.id)
    assert not mark.exists()
    assert Store(store.root).get(KEY.id)
    assert mark.is_file()
    for later in ('{"store": 2}', "[]", ""):
        mark.write_text(later)
        with pytest.raises(PlanError, match="does not understand"):
            Store(store.root)


def test_gc_touches_only_what_is_a_stores(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.make(KEY, write_one)
    (store.root / "mine").mkdir()
    (store.root / "mine.lock").touch()
    (store.root / f"link-{KEY.id}").symlink_to(tmp_path)
    assert store.garbage() == [KEY.id]
    assert not store.stray()


_HOLD = """
import sys, time
from pathlib import Path
from prune_export.system.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_what_killed_runs_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.make(KEY, write_one)
    dead = [f"{KEY.id}.lock", ".seen.json.99999", f"{KEY.id}/.manifest.json.99999",
            "roots/.0.json.99999"]  # fmt: skip
    (store.root / "roots").mkdir()
    for name in dead:
        (store.root / name).write_text("half")
    held = store.root / f"heal-lora-{'0' * 24}.lock"
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(held)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        assert sorted(store.stray()) == sorted(dead)
        store.sweep()
        assert not store.stray()
        assert held.exists()
        holder.kill()
        holder.wait()
    store.sweep()
    assert not held.exists()
    assert store.get(KEY.id) is not None
