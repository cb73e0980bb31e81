"""Where a command may write: what stands there is refused by name, and never touched."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from prune_export.errors import PlanError
from prune_export.system.places import judged, judged_picture, named
from prune_export.system.written import LOCK, SUMS, sha256_of, sums_text


def result(out: Path, **files: str) -> Path:
    """A result as this version writes it: a lock that names its files, and their hashes."""
    out.mkdir(parents=True)
    texts = {"config.json": "{}", "README.md": "card", "onnx/model.onnx": "graph"} | files
    for name, text in texts.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    (out / LOCK).write_text(json.dumps({"lock": 1, "files": sorted([*texts, LOCK, SUMS])}))
    (out / SUMS).write_text(sums_text({name: sha256_of(out / name) for name in [*texts, LOCK]}))
    return out


def earlier_result(out: Path) -> Path:
    """A result of before there was a list."""
    out.mkdir(parents=True)
    (out / "figures").mkdir()
    (out / "onnx").mkdir()
    for name in ("config.json", "README.md", "report.json", "figures/speed.png",
                 "onnx/model.onnx", "prune_recipe.yaml"):  # fmt: skip
        (out / name).write_text("{}")
    hashes = {"config.json": sha256_of(out / "config.json")}
    engine = {"model.onnx": sha256_of(out / "onnx" / "model.onnx")}
    artifacts = {
        "stages.0.prune": {"id": "p", "files": {"model-00001-of-00002.safetensors": "0" * 64}},
        "stages.1.heal": {"id": "h", "files": hashes},
        "export.onnx": {"id": "e", "files": engine},
    }
    (out / LOCK).write_text(json.dumps({"lock": 1, "artifacts": artifacts}))
    return out


def refused(out: Path, reads: dict[str, Path] | None = None) -> PlanError:
    before = sorted(map(str, out.rglob("*"))) if out.is_dir() else None
    with pytest.raises(PlanError) as caught:
        judged(out, reads or {})
    assert (sorted(map(str, out.rglob("*"))) if out.is_dir() else None) == before
    assert caught.value.fix
    return caught.value


def test_what_is_absent_or_empty_or_ours_is_taken(tmp_path: Path) -> None:
    assert judged(tmp_path / "absent", {}) == tmp_path / "absent"
    (tmp_path / "empty").mkdir()
    assert judged(tmp_path / "empty", {}) == tmp_path / "empty"
    assert judged(result(tmp_path / "ours"), {}) == tmp_path / "ours"
    assert judged(earlier_result(tmp_path / "earlier"), {}) == tmp_path / "earlier"
    (tmp_path / "ours" / "README.md").unlink()
    judged(tmp_path / "ours", {})


@pytest.mark.parametrize("make", [result, earlier_result])
def test_what_the_user_has_added_is_named(tmp_path: Path, make: object) -> None:
    assert callable(make)
    out = make(tmp_path / "out")
    (out / "notes.txt").write_text("years of work")
    (out / ".git").mkdir()
    (out / "onnx" / "mine.onnx").write_text("")
    (out / "runs").mkdir()
    (out / "link").symlink_to(tmp_path)
    error = refused(out)
    assert "holds .git/, link, notes.txt and 2 others, not written by this tool" in error.problem


def test_what_the_user_has_changed_is_named(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    (out / "README.md").write_text("my own card")
    assert "holds README.md, changed after this tool wrote it" in refused(out).problem
    out = earlier_result(tmp_path / "earlier")
    (out / "onnx" / "model.onnx").write_text("tuned")
    assert "holds onnx/model.onnx, changed" in refused(out).problem
    (out / "onnx" / "model.onnx").unlink()
    (out / "onnx" / "model.onnx").symlink_to(tmp_path)
    assert "holds onnx/model.onnx, not written" in refused(out).problem


def test_a_large_file_is_looked_at_when_it_is_younger_than_the_list(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    large = out / "onnx" / "model.onnx"
    with large.open("r+b") as file:
        file.truncate(65 << 20)
    assert "onnx/model.onnx, changed" in refused(out).problem
    os.utime(large, (1, 1))  # as old as what was written with the list: taken as it is
    judged(out, {})


def test_a_strangers_lists_make_nothing_outside_ours(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    listing = json.loads((out / LOCK).read_text())
    listing["files"] += ["../secret", "/etc/passwd", "", ".", 7, None, {}]
    (out / LOCK).write_text(json.dumps(listing))
    assert "changed" in refused(out).problem  # only by the lock's own hash
    for broken in ("[]", "null", "{", "[" * 100_000, '{"files": 3, "artifacts": {"a": 1}}'):
        (out / LOCK).write_text(broken)
        assert "not written by this tool" in refused(out).problem


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    for name, what in {"file": "a file", "pipe": "a pipe", "socket": "a socket"}.items():
        assert f"is {what}, expected a directory" in refused(tmp_path / name).problem
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
        assert f"is {what}, expected a directory" in refused(tmp_path / f"to-{name}").problem
        assert "not a directory" in refused(tmp_path / name / "below").problem
        assert (tmp_path / name).exists()
    server.close()
    assert "is a device" in refused(Path("/dev/null")).problem


def test_links_are_followed_or_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert judged(tmp_path / "link", {}) == tmp_path / "real"
    assert judged(tmp_path / "link" / "new", {}) == tmp_path / "real" / "new"
    (tmp_path / "dangling").symlink_to("nothing")
    assert "is not there" in refused(tmp_path / "dangling").problem
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop")
    refused(tmp_path / "loop" / "below")
    (tmp_path / "real" / "notes").write_text("")
    assert "holds notes" in refused(tmp_path / "link").problem


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 247, "a name of 247 bytes, expected at most 246"),
        ("ä" * 127, "a name of 254 bytes"),
        ("a" * 256, "too long"),
        ("a" * 300 + "/out", "too long"),
        ("b/" * 2000, "longer than 3800 bytes"),
        ("zero\0byte", "null byte"),
    ],
)
def test_names_that_no_directory_can_have(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        judged(tmp_path / name, {})
    assert says in caught.value.problem
    assert len(caught.value.where) < 300
    assert caught.value.where.isprintable()


def test_root_here_and_above_are_places_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PlanError, match="not written by this tool"):
        judged(Path("/"), {})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for here in (".", "", "./", "x/.."):
        assert judged(Path(here), {}) == tmp_path / "work"
    (tmp_path / "work" / "thesis.tex").write_text("")
    for here in (".", "", "./", "x/.."):
        assert "holds thesis.tex" in refused(Path(here)).problem


@pytest.mark.parametrize("name", ["the model", "the store", "the recipe", "the data root"])
def test_what_the_work_reads_is_not_put_at_stake(tmp_path: Path, name: str) -> None:
    out = result(tmp_path / "out")
    assert f"is {name} itself" in refused(out, {name: out}).problem
    assert f"holds {name}" in refused(out, {name: out / "onnx"}).problem
    absent = tmp_path / "absent"
    assert f"holds {name}" in refused(absent, {name: absent / "not" / "yet"}).problem
    (tmp_path / "alias").symlink_to(out)
    assert f"is {name} itself" in refused(tmp_path / "alias", {name: out}).problem
    assert f"is {name} itself" in refused(out, {name: tmp_path / "alias"}).problem
    if name == "the store":
        assert "lies in the store" in refused(absent / "out", {name: absent}).problem
    else:  # as the README has it: `--data-root .demo --out .demo/out`
        assert judged(absent / "out", {name: absent}) == absent / "out"


def test_a_place_that_may_not_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert f"{tmp_path / 'out'} may not be written to" in refused(tmp_path / "out").problem
    assert f"{tmp_path} may not be written to" in refused(tmp_path / "new" / "out").problem


def test_an_engine_takes_the_place_of_nothing(tmp_path: Path) -> None:
    out = result(tmp_path / "out")
    with pytest.raises(PlanError, match="is not empty: holds README"):
        judged(out, {}, again=False)


def test_a_picture_is_written_over_only_by_its_like(tmp_path: Path) -> None:
    judged_picture(tmp_path / "new.png", "prune-export inspect")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of a cat")
    (tmp_path / "ours.png").write_bytes(b"\x89PNG Source\0prune-export inspect")
    judged_picture(tmp_path / "ours.png", "prune-export inspect")
    (tmp_path / "link.png").symlink_to("ours.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("photo.png", "link.png", "pipe.png", "no/new.png", "new.jpg", "a" * 256 + ".png"):
        with pytest.raises(PlanError):
            judged_picture(tmp_path / name, "prune-export inspect")


def test_names_are_shown_without_what_a_terminal_obeys() -> None:
    assert named(["a"]) == "a"
    assert named(["a", "b"]) == "a and b"
    assert named(["a", "b", "c"]) == "a, b and c"
    assert named(["a", "b", "c", "d"]) == "a, b, c and 1 other"
    assert named(["\x1b[2J", "ä"]) == "\\x1b[2J and ä"
