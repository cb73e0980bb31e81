"""The store: complete or absent, built once, never believed when its bytes changed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from prune_export.errors import PlanError
from prune_export.store import Key, Store, canonical_json, place
from prune_export.store.notes import seen_in

KEY = Key("prune", "deepest", "1", {"remove": 2}, ("model-0",), None)


def write_one(files: Path, scratch: Path) -> Mapping[str, Any]:
    (files / "deep").mkdir()
    (files / "deep" / "a.bin").write_bytes(b"x" * 1000)
    assert scratch.is_dir()
    return {"log": {"dropped": [1]}}


def never(files: Path, scratch: Path) -> Mapping[str, Any]:
    raise AssertionError("built again")


def test_a_place_that_cannot_be_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(PlanError, match=r"cannot be made[\s\S]*--store"):
        Store(tmp_path / "file" / "store")


def test_made_once_and_found_again(tmp_path: Path) -> None:
    made = Store(tmp_path).make(KEY, write_one)
    again = Store(tmp_path).make(KEY, never)
    assert again.path == made.path
    assert again.record == {"log": {"dropped": [1]}}
    assert again.files["deep/a.bin"] == made.files["deep/a.bin"]
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.lock"))


def test_knows_what_it_made_from_what_a_stranger_did(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    made = store.make(KEY, write_one)
    copy = tmp_path / "out"
    place(made.path / "deep" / "a.bin", copy / "deep" / "a.bin")
    assert store.made("prune", copy)
    assert not store.made("export", copy)
    (copy / "deep" / "a.bin").write_bytes(b"y" * 1000)
    assert not store.made("prune", copy)
    place(made.path / "deep" / "a.bin", copy / "deep" / "a.bin")
    (copy / "more").write_text("")
    assert not store.made("prune", copy)
    assert not Store(tmp_path / "other").made("prune", copy)


def test_every_part_of_the_key_counts() -> None:
    others = [
        Key("heal", "deepest", "1", {"remove": 2}, ("model-0",), None),
        Key("prune", "other", "1", {"remove": 2}, ("model-0",), None),
        Key("prune", "deepest", "2", {"remove": 2}, ("model-0",), None),
        Key("prune", "deepest", "1", {"remove": 3}, ("model-0",), None),
        Key("prune", "deepest", "1", {"remove": 2}, ("model-1",), None),
        Key("prune", "deepest", "1", {"remove": 2}, ("model-0",), "data"),
    ]
    assert len({KEY.id, *(other.id for other in others)}) == 7


def test_canonical_json_ignores_order_and_refuses_nan() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None]}) == canonical_json({"a": [1.5, None], "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": float("nan")})


def test_changed_bytes_are_not_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.make(KEY, write_one).path / "deep" / "a.bin"
    file.write_bytes(b"y" * 1000)
    assert store.get(KEY.id) is None
    assert (store.make(KEY, write_one).path / "deep" / "a.bin").read_bytes() == b"x" * 1000


def test_touched_but_equal_bytes_are_believed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    file = store.make(KEY, write_one).path / "deep" / "a.bin"
    os.utime(file, (1, 1))
    assert store.get(KEY.id) is not None


def test_a_missing_file_makes_it_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (store.make(KEY, write_one).path / "deep" / "a.bin").unlink()
    assert store.get(KEY.id) is None


def test_force_builds_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.make(KEY, write_one)

    def other(files: Path, scratch: Path) -> Mapping[str, Any]:
        (files / "b").write_text("new")
        return {}

    assert set(store.make(KEY, other, force=True).files) == {"b"}


def test_a_failed_build_leaves_nothing_complete_and_keeps_its_scratch(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fails(files: Path, scratch: Path) -> Mapping[str, Any]:
        (files / "half").write_text("half")
        (scratch / "checkpoint").write_text("step 7")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.make(KEY, fails)
    assert store.get(KEY.id) is None

    def resumes(files: Path, scratch: Path) -> Mapping[str, Any]:
        assert not list(files.iterdir())
        (files / "whole").write_text((scratch / "checkpoint").read_text())
        return {}

    assert (store.make(KEY, resumes).path / "whole").read_text() == "step 7"


_BUILD_FOREVER = """
import sys, time
from pathlib import Path
from prune_export.store import Key, Store
def build(files, scratch):
    (scratch / "mark").write_text("begun")
    (files / "half").write_text("half")
    print("building", flush=True)
    time.sleep(600)
key = Key("prune", "deepest", "1", {"remove": 2}, ("model-0",), None)
Store(Path(sys.argv[1])).make(key, build)
"""


def test_a_killed_build_frees_its_lock_and_is_gone_on_with(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD_FOREVER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"building\n"
    assert KEY.id not in Store(tmp_path).garbage()
    assert not Store(tmp_path).garbage(), "what is being built is not garbage"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert Store(tmp_path).garbage() == [f"{KEY.id}.partial"]

    def resumes(files: Path, scratch: Path) -> Mapping[str, Any]:
        assert (scratch / "mark").read_text() == "begun"
        assert not list(files.iterdir())
        return {}

    assert Store(tmp_path).make(KEY, resumes).record == {}


def _slow_build(root: Path, log: Path) -> None:
    def build(files: Path, scratch: Path) -> Mapping[str, Any]:
        with log.open("a") as stream:
            stream.write("built\n")
        time.sleep(0.3)
        (files / "a").write_text("a")
        return {}

    Store(root).make(KEY, build)


def test_two_processes_build_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [
        context.Process(target=_slow_build, args=(tmp_path / "store", log)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert log.read_text() == "built\n"


def test_gc_keeps_what_a_result_needs(tmp_path: Path) -> None:
    store, out = Store(tmp_path / "store"), tmp_path / "out"
    out.mkdir()
    kept = store.make(KEY, write_one)
    other = store.make(Key("prune", "deepest", "1", {"remove": 9}), write_one)
    store.remember(out, [kept.id])
    assert store.garbage() == [other.id]
    store.remove(other.id)
    assert [name for name, *_ in store.artifacts()] == [kept.id]
    out.rmdir()
    assert store.garbage() == [kept.id]


def test_file_hash_sees_changes(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "weights"
    file.write_bytes(b"one")
    first = store.file_hash(file)
    assert store.file_hash(file) == first
    file.write_bytes(b"two!")
    assert store.file_hash(file) != first


def test_a_files_name_proves_nothing(tmp_path: Path) -> None:
    """A stranger's file may be called by the hash of another, as the Hub's cache calls its own."""
    genuine = tmp_path / "model.safetensors"
    genuine.write_bytes(b"genuine weights")
    store = Store(tmp_path / "store")
    digest = hashlib.sha256(b"genuine weights").hexdigest()
    for cache in ("models--org--name/blobs", "blobs"):
        blob = tmp_path / cache / digest
        blob.parent.mkdir(parents=True)
        blob.write_bytes(b"strange weights")
        link = tmp_path / cache / "model.safetensors"
        link.symlink_to(blob)
        for file in (link, blob):
            assert store.file_hash(file) == hashlib.sha256(b"strange weights").hexdigest()
    assert store.file_hash(genuine) == digest


def test_a_hash_is_remembered_until_anything_about_the_file_changes(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, ns=(1 << 61, 1 << 61))  # as if written just now, however long this test takes
    store.file_hash(file)
    assert not seen_in(store.root / "seen.json"), "it may change again within one tick"
    status = file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    known = {str(file): {"stamp": stamp, "sha256": "ab" * 32}}
    (store.root / "seen.json").write_text(json.dumps(known))
    assert store.file_hash(file) == "ab" * 32
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))  # but nobody sets the ctime
    assert store.file_hash(file) == hashlib.sha256(b"two").hexdigest()


def test_an_edit_of_a_placed_file_does_not_reach_the_source(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "out" / "b"
    source.write_bytes(b"1234")
    place(source, target)
    target.write_bytes(b"9")
    assert source.read_bytes() == b"1234"


def test_manifest_is_readable_json(tmp_path: Path) -> None:
    made = Store(tmp_path).make(KEY, write_one)
    manifest = json.loads((made.path.parent / "manifest.json").read_text())
    assert manifest["parameters"] == {"remove": 2}
    assert manifest["inputs"] == ["model-0"]
