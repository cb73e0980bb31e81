"""Where commands may write, and what the store's own commands may delete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prune_export.store import Key, Store

KEY = Key("prune", "deepest", "1", {"remove": 2}, ("model-0",), None)
RECIPE = """\
recipe: 1
stages:
  - prune: {method: deepest, remove: 2}
verify: {parity: false, generation: false}
"""


@pytest.fixture
def joined(cli: Any) -> Any:
    """As `cli`, what is said on standard error in one line."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status, shown, said = cli(*arguments)
        assert "Traceback" not in said
        return status, shown, " ".join(said.split())

    return run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def made(store: Store, **parameters: int) -> str:
    def build(files: Path, scratch: Path) -> dict[str, Any]:
        (files / "a").write_text("a")
        return {}

    key = Key("prune", "deepest", "1", parameters)
    return store.make(key, build).id


@pytest.mark.parametrize("command", ["gc", "ls"])
def test_a_directory_that_is_no_store_is_not_cleaned(
    joined: Any, tmp_path: Path, command: str
) -> None:
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "cat.jpg").write_text("")
    status, _, told = joined("store", command, "--store", home)
    assert status == 2
    assert "is no store" in told
    assert "photos" in told
    assert (home / "photos" / "cat.jpg").exists()
    status, _, told = joined("store", command, "--store", tmp_path / "absent")
    assert status == 2
    assert "no run has used it" in told
    assert not (tmp_path / "absent").exists()


def test_a_default_store_that_was_never_used_is_empty(
    joined: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNE_EXPORT_STORE", str(tmp_path / "store"))
    assert "0 artifacts" in joined("store", "ls")[1]
    assert "removed 0 artifacts" in joined("store", "gc")[1]
    assert not (tmp_path / "store").exists()


def test_gc_says_what_it_could_not_read(joined: Any, tmp_path: Path, store: Store) -> None:
    kept, broken = made(store, remove=1), made(store, remove=2)
    store.remember(tmp_path, [kept, broken])
    (store.root / broken / "manifest.json").write_text("null")
    (store.root / "roots" / "x.json").write_text("[]")
    (store.root / "seen.json").write_text("[]")
    (store.root / f"{kept}.lock").touch()
    where = ("--store", store.root)
    assert json.loads(joined("store", "ls", *where, "--json")[1])
    told = joined("store", "gc", *where, "--dry-run")[1]
    assert "would remove 1 artifacts" in told
    found = json.loads(joined("store", "gc", *where, "--json")[1])
    assert found["removed"] == [broken]
    assert sorted(found["broken"]) == sorted([broken, "roots/x.json"])
    assert f"{kept}.lock" in found["left_by_killed_runs"]
    assert store.get(kept)
    assert not (store.root / broken).exists()
    assert joined("store", "gc", *where)[1].splitlines() == ["removed 0 artifacts, 0 B"]


def test_an_engine_is_put_only_where_nothing_is(
    joined: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    export = ("export", tiny_llama, "--to", "onnx", "--store", tmp_path / "store", "--out")
    for place, says in {
        out: "holds notes.txt", tiny_llama: "is not empty", tmp_path / "pipe": "is a pipe",
        tmp_path / "store" / "out": "lies in the store", tiny_llama.parent: "is not empty",
        tmp_path / ("a" * 300): "too long", "/dev/null": "is a device",
    }.items():  # fmt: skip
        status, _, told = joined(*export, place)
        assert status == 2
        assert says in told
    assert (out / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "store").glob("*-*"))


def test_a_picture_replaces_nobodys(joined: Any, tiny_llama: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG of a cat")
    status, _, told = joined("inspect", tiny_llama, "--data", photo, "--out", photo)
    assert status == 2
    assert "a file that prune-export inspect did not write" in told
    assert photo.read_bytes() == b"\x89PNG of a cat"


def test_a_user_without_a_home_directory_can_plan(
    joined: Any, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number that its passwd does not know."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(RECIPE)

    def unknown(number: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "PRUNE_EXPORT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    plan = ("plan", recipe, "--model", tiny_llama, "--out", tmp_path / "out", "--threads", 1)
    status, _, told = joined(*plan)
    assert status == 2
    assert "no home directory" in told
    assert "--store" in told
    assert joined(*plan, "--store", tmp_path / "store")[0] == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert joined(*plan)[0] == 0
    for model in ("~/model", "~nobody-of-this-name/model"):
        status, _, told = joined("plan", recipe, "--model", model, "--threads", 1)
        assert status == 2
        assert "is not a Hub id" in told
